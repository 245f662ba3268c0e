"""Tests, a folder for each of the package's; ``integration/`` starts launchers, clusters and kills,
``helpers/`` is what several share.
"""
