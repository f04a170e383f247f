"""The HTTP surface of the endpoint: bodies, limits, keys, problems, options, site, metrics."""
