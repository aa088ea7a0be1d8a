"""Two components of a run: a data source (`data=parity`) and an optimizer (`optimizer=lion`)."""
