"""The engine on a Transformers model: continuous batching over a shared cache. Its other files are parts of it."""
