"""One column band of a slide: tiles in, blended label rows out."""
