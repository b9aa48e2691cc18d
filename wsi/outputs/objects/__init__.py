"""Connected objects of a label map, found as its rows come in."""
