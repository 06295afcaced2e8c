"""One page that says whether a trained network does what its layers were derived to do."""
