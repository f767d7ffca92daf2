"""Published data sets to a folder that `penchant train` reads: catalogue, download, filters, conversion, split."""
