"""Providers of identities: who somebody is, as GitHub, Google or an OpenID Connect provider says."""
