"""Rows with images: images into columns of their own, and into batches."""
