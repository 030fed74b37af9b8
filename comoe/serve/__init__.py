"""`comoe serve-experts`: the experts of a packed store, computed for other machines."""
