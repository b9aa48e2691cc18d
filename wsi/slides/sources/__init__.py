"""Sources of slides (disk, web, object storage), one per file; `histostream.wsi.slides.staging` uses them.

Each module has the members of `base.Source` and is found by the schemes that it declares. Nothing
is configured here; each kind of source has its own environment:

``s3://``
    AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL (MinIO
    and others), or FSSPEC_S3='{"anon": true}' for public buckets.
``gs://``
    GOOGLE_APPLICATION_CREDENTIALS or ``gcloud auth application-default login``,
    STORAGE_EMULATOR_HOST, or FSSPEC_GS='{"token": "anon"}' for public buckets.
``https://``
    A signed URL, or name and password in ``~/.netrc`` (or the file that NETRC names).
"""
