"""Photos from folders, buckets and archives into Parquet shards."""
