"""How much a layer loses with another mixer: a table by layer and candidate, from an order or from measurements."""
