"""A report on whether a trained network does what its layers were derived to do."""
