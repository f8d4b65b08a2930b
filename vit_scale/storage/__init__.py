"""One interface to files on disk and to objects in a bucket, `gs://BUCKET/NAME`.

`paths` turns a name into a path and lists folders; `files` writes whole files or none; `cache` has
the local copies of objects; `ranges` reads parts of files, which `range_cache` keeps for objects;
`compare_and_swap` writes an object only if nobody else has; `download` fetches files over HTTP;
`errors` turns what storage raises into one line for the user.
Guarantees: nobody reads a half-written file, and a failure names the path and the reason.
"""
