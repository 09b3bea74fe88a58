"""The embedded zoo: small real models of a small real world, and how they are rebuilt."""
