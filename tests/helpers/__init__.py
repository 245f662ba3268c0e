"""Code that tests of several folders share; ``multi_run.py`` and ``faults.py`` are programs."""
