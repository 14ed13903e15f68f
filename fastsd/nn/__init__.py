"""Modules built on the ops: what ``patch`` switches stock modules to.

Each file stands for one stock module and imports its library; import the file, not this package.
"""
