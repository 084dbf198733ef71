//! Addresses of storages, as given in `OPTIONS (url …)`. No message repeats an address: it may carry a secret.

use std::path::{Component, Path, PathBuf};

use object_store::path::Path as ObjectPath;

use crate::error::LakeError;

/// The address of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StorageUrl {
    /// An absolute, normalised directory.
    File(PathBuf),
    Bucket(BucketUrl),
}

/// A bucket (of Azure: a container) and the prefix below which everything lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketUrl {
    pub cloud: Cloud,
    pub bucket: String,
    /// Without slashes at its ends; empty for the whole bucket.
    pub prefix: String,
    /// The account in an `abfss://container@account.dfs.core.windows.net/` address.
    pub account: Option<String>,
}

/// Whose protocol a bucket speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cloud {
    S3,
    Google,
    Azure,
}

impl Cloud {
    /// The scheme under which addresses are shown.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }
}

impl StorageUrl {
    pub fn parse(url: &str) -> Result<Self, LakeError> {
        let (scheme, rest) = url
            .split_once("://")
            .ok_or_else(|| invalid("it has no scheme"))?;
        if rest.contains(char::is_control) {
            return Err(invalid("it contains a control character"));
        }
        let cloud = match scheme.to_ascii_lowercase().as_str() {
            "file" => return file(rest),
            "s3" | "s3a" | "s3n" => Cloud::S3,
            "gs" | "gcs" => Cloud::Google,
            "az" | "azure" | "adl" | "abfs" | "abfss" => Cloud::Azure,
            "hdfs" | "webhdfs" => {
                return Err(LakeError::Unsupported {
                    message: "storage scheme \"hdfs\" is not supported".to_owned(),
                    hint: "Mount the file system and use file:///dir, or use a bucket, s3://bucket/prefix."
                        .to_owned(),
                });
            }
            // The url may carry a secret where the scheme should be: it is not repeated.
            _ => {
                return Err(LakeError::Unsupported {
                    message: "storage scheme is not supported".to_owned(),
                    hint: "Use file:///dir, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix."
                        .to_owned(),
                });
            }
        };
        bucket(cloud, rest).map(Self::Bucket)
    }

    /// The kind of a storage as the catalogue names it: the scheme under which its address is shown.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::Bucket(bucket) => bucket.cloud.scheme(),
        }
    }
}

impl BucketUrl {
    /// The bucket that a URL of objects names, and the path in it, which may be a pattern; None: it is of no bucket.
    pub fn of_objects(url: &str) -> Result<Option<(Self, &str)>, LakeError> {
        let (whole, path) = match url.split_once("://") {
            Some((_, rest)) => {
                let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
                (&url[..url.len() - rest.len() + authority.len()], path)
            }
            None => (url, ""),
        };
        if url
            .split_once("://")
            .is_some_and(|(scheme, _)| scheme.eq_ignore_ascii_case("file"))
        {
            return Ok(None);
        }
        if path.contains(char::is_control) {
            return Err(invalid("it contains a control character"));
        }
        match StorageUrl::parse(whole)? {
            StorageUrl::File(_) => Ok(None),
            StorageUrl::Bucket(bucket) => Ok(Some((bucket, path.trim_end_matches('/')))),
        }
    }

    /// The rest of a path in `bucket` below this address; None: it is elsewhere, or the address itself.
    pub fn below<'a>(&self, bucket: &Self, path: &'a str) -> Option<&'a str> {
        let same = self.cloud == bucket.cloud
            && self.bucket == bucket.bucket
            && (bucket.account.is_none() || bucket.account == self.account);
        let rest = match path.strip_prefix(self.prefix.as_str()).filter(|_| same)? {
            rest if self.prefix.is_empty() => rest,
            rest => rest.strip_prefix('/')?,
        };
        (!rest.is_empty()).then_some(rest)
    }
}

fn invalid(reason: &str) -> LakeError {
    LakeError::InvalidUrl {
        reason: reason.to_owned(),
    }
}

fn file(rest: &str) -> Result<StorageUrl, LakeError> {
    if !rest.starts_with('/') {
        return Err(invalid("the path of a file url must be absolute"));
    }
    let path = Path::new(rest);
    if path.components().any(|c| c == Component::ParentDir) {
        return Err(invalid("the path of a file url must not contain \"..\""));
    }
    let path: PathBuf = path.components().collect();
    if path == Path::new("/") {
        return Err(invalid("the root directory cannot be a storage"));
    }
    Ok(StorageUrl::File(path))
}

fn bucket(cloud: Cloud, rest: &str) -> Result<BucketUrl, LakeError> {
    let (authority, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let (bucket, account) = match authority.split_once('@') {
        Some((container, host)) if cloud == Cloud::Azure && !container.contains(':') => {
            let account = host.split('.').next().unwrap_or_default();
            if !name_is_plain(account) {
                return Err(invalid("the account is not a valid name"));
            }
            (container, Some(account.to_owned()))
        }
        Some(_) => {
            return Err(invalid(
                "it contains credentials, which belong into a user mapping of the server's owner",
            ));
        }
        None => (authority, None),
    };
    if bucket.is_empty() {
        return Err(invalid("it names no bucket"));
    }
    if !name_is_plain(bucket) {
        return Err(invalid("the bucket is not a valid name"));
    }
    if prefix.contains(['?', '#', '\\']) {
        return Err(invalid(
            "the prefix must not contain \"?\", \"#\" or \"\\\"",
        ));
    }
    let prefix = prefix.trim_end_matches('/');
    let plain = prefix.is_empty()
        || !prefix
            .split('/')
            .any(|part| matches!(part, "" | "." | ".."));
    if !plain || ObjectPath::parse(prefix).is_err() {
        return Err(invalid("the prefix is not a plain path"));
    }
    Ok(BucketUrl {
        cloud,
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
        account,
    })
}

fn name_is_plain(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'$');
    !name.is_empty() && name.len() <= 255 && name.bytes().all(plain) && !matches!(name, "." | "..")
}

impl std::fmt::Display for StorageUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::Bucket(bucket) => bucket.fmt(f),
        }
    }
}

impl std::fmt::Display for BucketUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.cloud.scheme(), self.bucket)?;
        if self.prefix.is_empty() {
            Ok(())
        } else {
            write!(f, "/{}", self.prefix)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let ok = |url: &str| StorageUrl::parse(url).map(|u| u.to_string()).unwrap();
        for (url, shown) in [
            ("file:///var/lake", "file:///var/lake"),
            ("FILE:///var//lake/./a/", "file:///var/lake/a"),
            ("s3://bucket", "s3://bucket"),
            ("s3a://bucket/", "s3://bucket"),
            ("S3://my-bucket.x/a/b/", "s3://my-bucket.x/a/b"),
            ("gcs://bucket/a b", "gs://bucket/a b"),
            ("azure://c/p", "az://c/p"),
            ("abfss://c@acc.dfs.core.windows.net/p", "az://c/p"),
        ] {
            assert_eq!(ok(url), shown);
        }
        for (url, state) in [
            ("", "22023"),
            ("/var/lake", "22023"),
            ("file://var/lake", "22023"),
            ("file://", "22023"),
            ("file:///", "22023"),
            ("file:///a/../b", "22023"),
            ("file:///a\0", "22023"),
            ("s3://", "22023"),
            ("s3:///a", "22023"),
            ("s3://b/a//b", "22023"),
            ("s3://b/../b", "22023"),
            ("s3://b/a?hunter2", "22023"),
            ("s3://b\n/a", "22023"),
            ("s3://key:hunter2@b/a", "22023"),
            ("abfss://c:hunter2@b/a", "22023"),
            ("hdfs://namenode/lake", "0A000"),
            ("ftp://host", "0A000"),
            ("hunter2://x", "0A000"),
        ] {
            let error = StorageUrl::parse(url).unwrap_err();
            assert_eq!(error.sqlstate(), state, "{url}");
            assert!(error.hint().is_some());
            assert!(!format!("{error}{error:?}").contains("hunter2"), "{url}");
        }
    }

    #[test]
    fn objects_are_below_the_address_of_a_storage() {
        let root = |url: &str| match StorageUrl::parse(url).unwrap() {
            StorageUrl::Bucket(bucket) => bucket,
            StorageUrl::File(_) => panic!("no bucket"),
        };
        let below = |url: &'static str, address: &str| {
            let (bucket, path) = BucketUrl::of_objects(url).unwrap().unwrap();
            root(address).below(&bucket, path)
        };
        assert_eq!(below("s3://b/p/x?*.csv", "s3a://b/p/"), Some("x?*.csv"));
        assert_eq!(below("S3://b/p/x/", "s3://b"), Some("p/x"));
        for elsewhere in [
            "s3://b/p",
            "s3://b/px/y",
            "s3://b/*/y",
            "s3://c/p/x",
            "gs://b/p/x",
            "s3://b",
        ] {
            assert_eq!(below(elsewhere, "s3://b/p"), None, "{elsewhere}");
        }
        let account = "abfss://c@one.dfs.core.windows.net/";
        assert_eq!(below("az://c/x", account), Some("x"));
        assert_eq!(
            below("abfss://c@one.dfs.core.windows.net/x", account),
            Some("x")
        );
        assert_eq!(below("abfss://c@two.dfs.core.windows.net/x", account), None);
        assert_eq!(BucketUrl::of_objects("File:///a/*").unwrap(), None);
        for bad in [
            "s3://key:hunter2@b/a",
            "s3:///a",
            "s3://b/a\n",
            "ftp://hunter2/x",
            "x",
        ] {
            let error = BucketUrl::of_objects(bad).unwrap_err();
            assert!(!format!("{error}").contains("hunter2"), "{bad}");
        }
    }

    #[test]
    fn the_account_of_a_full_azure_address_is_known() {
        let url = StorageUrl::parse("abfss://c@acc.dfs.core.windows.net/p").unwrap();
        let StorageUrl::Bucket(bucket) = url else {
            panic!("no bucket")
        };
        assert_eq!(bucket.account.as_deref(), Some("acc"));
        assert_eq!(bucket.bucket, "c");
    }
}
