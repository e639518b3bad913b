"""Secrets that are none, in the forms that issuers use; split, so that no scanner takes them for real ones."""

BY_FORM = {
    "Hugging Face": "hf" + "_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "GitHub": "ghp" + "_0123456789abcdefghijABCDEFGHIJ012345",
    "GitHub, fine-grained": "github_pat" + "_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
    "GitLab": "glpat" + "-abcdefghijklmnopqrst",
    "OpenAI": "sk" + "-proj-abcdefghijklmnopqrstuvwxyz0123",
    "Anthropic": "sk" + "-ant-api03-abcdefghijklmnopqrstuvwxyz",
    "Slack": "xoxb" + "-123456789012-abcdefghijkl",
    "AWS": "AKIA" + "ABCDEFGHIJKLMNOP",
    "Google": "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "a JSON web token": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123",
}
# A text in which a secret can be told by what stands around it, and the secret.
IN_TEXT = {
    "a password in a URL": ("https://user:pass1234@host/x.git", "pass1234"),
    "a user in a URL": ("https://abcdefghij0123456789@host/x.git", "abcdefghij0123456789"),
    "a key in a URL of a bucket": ("s3://key1:secret1@bucket/x", "secret1"),
    "a token in a query": ("https://h/x?token=abc123&y=1", "abc123"),
    "a signature in a query": ("https://h/x?y=1&sig=abc123", "abc123"),
    "an access token in a query": ("https://h/x?access_token=abc123#y", "abc123#y"),
    "a signed URL": ("https://h/x?X-Amz-Signature=abc123&X-Amz-Date=1", "abc123"),
    "JSON": ('{"token": "abc123", "revision": "main"}', "abc123"),
    "a dict": ("{'revision': 'main', 'hub_token': 'abc123'}", "abc123"),
    "YAML in one line": ("{token: abc123, revision: main}", "abc123"),
    "a header": ("Authorization: Bearer abcdefgh123", "abcdefgh123"),
}
