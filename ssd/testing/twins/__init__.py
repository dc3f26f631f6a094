"""Stand-ins for pipelines, engines and servers."""
