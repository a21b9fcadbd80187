"""The product: job configuration, the pipeline that runs a job, and its faces."""
