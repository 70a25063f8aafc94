"""Image classifiers through the same four stages: their networks, data, packed layers and the `compress` run."""
