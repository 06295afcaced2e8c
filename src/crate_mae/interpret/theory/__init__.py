"""The theory, checked on data that obey its assumptions: measured in five files, drawn in one, published in one."""
