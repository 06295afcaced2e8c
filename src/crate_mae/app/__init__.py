"""The page: hide patches of a picture, watch it be completed, look inside."""
