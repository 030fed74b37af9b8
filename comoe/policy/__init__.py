"""Decides: which level each expert may be computed at, what is held, what is fetched ahead.

numpy only: everything here also runs in a simulation, without a model.
"""
