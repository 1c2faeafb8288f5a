"""Methods of sparse training, one file each; `method` has their record."""
