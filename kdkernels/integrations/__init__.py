"""The losses of other frameworks, with their own signatures and conventions, computed by kdkernels.

A module a framework; none imports its framework before it has to. Where an adapter differs from the original on
purpose, its docstring says so.
"""
