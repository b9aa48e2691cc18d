"""Connected objects of a label map, found while its rows are written."""
