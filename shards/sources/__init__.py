"""One file a dataset. Each reads the published lists as they are and says which clips there are."""
