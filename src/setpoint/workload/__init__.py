"""Traffic: traces of requests, made, imported, described, cut and scaled. No text unless somebody asked for it."""
