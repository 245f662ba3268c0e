"""Is the cluster sound, do the promises hold here, does a run survive?"""
