"""The parent: it owns the network and never imports torch. Requests in, a child a job, results and events out."""
