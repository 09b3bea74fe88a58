"""Student to edge bundles: graphs, quantisation, targets, parity."""
