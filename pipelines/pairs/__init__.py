"""Training pairs on Ray Data, in an order that is a pure function of seed and step."""
