"""What runs behind the walls, or builds them: standard library and IPython only.

The warm interpreter loads this folder as a package of its own name (`start.py`), without the rest of the package.
`confinement`, `scratch` and `protocol` are used on both sides of the wall.
"""
