"""Sources of a store's bytes that are not here: servers, object stores and hubs, and the local cache of them.

Imports nothing above the store, and neither torch nor transformers.
"""
