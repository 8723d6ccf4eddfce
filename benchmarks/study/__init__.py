"""Do the papers' orderings hold? Arms over the shipped trainers and loop, on policies that train in a minute.

`python -m benchmarks.study` runs what is missing and reports; `docs/evidence.md` has the results.
"""
