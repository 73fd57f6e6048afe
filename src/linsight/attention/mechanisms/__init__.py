"""The catalogue: one file, one mechanism. All of them are imported, and so registered, with `linsight.attention`."""
