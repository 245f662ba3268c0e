"""Tests, in a folder for each folder of the package.

``integration/`` has tests with launchers, clusters and kills; ``helpers/`` has shared code.
"""
