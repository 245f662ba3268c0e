"""What tests of several folders use. ``multi_run.py`` and ``faults.py`` are programs that tests
start.
"""
