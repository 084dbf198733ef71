//! Where a storage is, however its address is written: links, dots and slashes of a directory, the endpoint of a bucket.
//! By this it is found out which storages overlap, and in which of them a file lies. What the names do not tell (two hosts
//! that are one machine, a directory mounted twice) is not known here.

use std::fs;
use std::path::{Path, PathBuf};

use super::options::Credentials;
use super::url::{BucketUrl, Cloud, StorageUrl};
use super::{StorageConfig, StorageOptions};

/// A directory or file of this machine, or what lies below a path of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    root: Root,
    /// Absolute and without symbolic links as far as it exists; in a bucket the whole key.
    path: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Root {
    Machine,
    Bucket {
        cloud: Cloud,
        /// None: nobody knows whose bucket of this name it is, so it may be any.
        service: Option<String>,
        bucket: String,
    },
}

/// How a place lies to another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Position {
    Same,
    /// Below the other one, at this path of it, with `/`.
    Within(String),
    /// The other one lies below it.
    Around,
}

impl Place {
    /// Of a storage. Resolves the links of a directory: looks at its names on disk, and waits for nothing else.
    pub fn of(config: &StorageConfig) -> Self {
        match &config.url {
            StorageUrl::File(path) => Self::of_file(path),
            StorageUrl::Bucket(url) => {
                let service = service(url, &config.options, &config.credentials);
                Self::of_objects(url, &url.prefix, Some(service))
            }
        }
    }

    /// Of a file or directory, by its absolute path. What does not exist yet lies where the rest of the path says.
    pub fn of_file(path: &Path) -> Self {
        let real = path.ancestors().find_map(|above| {
            let rest = path.strip_prefix(above).ok()?;
            Some(fs::canonicalize(above).ok()?.join(rest))
        });
        Self {
            root: Root::Machine,
            path: real.unwrap_or_else(|| path.to_owned()),
        }
    }

    /// Of the objects below a path of a bucket, wherever there is one of this name.
    pub fn of_any_bucket(url: &BucketUrl, path: &str) -> Self {
        Self::of_objects(url, path, None)
    }

    fn of_objects(url: &BucketUrl, path: &str, service: Option<String>) -> Self {
        Self {
            root: Root::Bucket {
                cloud: url.cloud,
                service,
                bucket: url.bucket.clone(),
            },
            path: PathBuf::from(path),
        }
    }

    /// Of the objects below a path of a bucket of the same service.
    pub fn beside(&self, url: &BucketUrl, path: &str) -> Self {
        let service = match &self.root {
            Root::Bucket { cloud, service, .. } if *cloud == url.cloud => service.clone(),
            _ => None,
        };
        Self::of_objects(url, path, service)
    }

    /// What lies at a path below it. Links are not looked for again.
    pub fn below(&self, path: &str) -> Self {
        Self {
            root: self.root.clone(),
            path: self.path.join(path),
        }
    }

    /// As [`Self::below`], with the links in the path resolved.
    pub fn resolved(&self, path: &str) -> Self {
        match self.root {
            Root::Machine => Self::of_file(&self.path.join(path)),
            Root::Bucket { .. } => self.below(path),
        }
    }

    /// None: nothing lies in both.
    pub fn position(&self, other: &Self) -> Option<Position> {
        if !self.root.may_be(&other.root) {
            return None;
        }
        if self.path == other.path {
            return Some(Position::Same);
        }
        if other.path.starts_with(&self.path) {
            return Some(Position::Around);
        }
        let below = self.path.strip_prefix(&other.path).ok()?;
        Some(Position::Within(below.to_str()?.to_owned()))
    }

    /// Whether it is the other one or lies below it.
    pub fn lies_in(&self, other: &Self) -> bool {
        matches!(
            self.position(other),
            Some(Position::Same | Position::Within(_))
        )
    }
}

impl Root {
    fn may_be(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Bucket {
                    cloud,
                    service,
                    bucket,
                },
                Self::Bucket {
                    cloud: other_cloud,
                    service: other_service,
                    bucket: other_bucket,
                },
            ) => {
                cloud == other_cloud
                    && bucket == other_bucket
                    && (service == other_service || service.is_none() || other_service.is_none())
            }
            _ => self == other,
        }
    }
}

/// The part of a pattern before its first name that is one: everything that it matches lies below that.
pub fn fixed_part(pattern: &str) -> String {
    let fixed: Vec<&str> = (pattern.split('/'))
        .take_while(|name| !name.contains(['*', '?', '[']))
        .collect();
    fixed.join("/")
}

/// Whose buckets an endpoint has, in one spelling. A region or protocol does not make another service of it.
fn service(url: &BucketUrl, options: &StorageOptions, credentials: &Credentials) -> String {
    let endpoint = options.endpoint.as_deref().map(host);
    let of = |domain: &str| {
        let beyond = endpoint.as_deref().map(|host| host.strip_suffix(domain));
        beyond
            .is_none_or(|beyond| beyond.is_some_and(|name| name.is_empty() || name.ends_with('.')))
    };
    let region = options.region.as_deref().unwrap_or_default();
    match url.cloud {
        // The names of buckets are unique all over Amazon, but for China.
        Cloud::S3 if endpoint.is_none() && region.starts_with("cn-") => {
            "amazonaws.com.cn".to_owned()
        }
        Cloud::S3 if of("amazonaws.com") => "amazonaws.com".to_owned(),
        Cloud::S3 if of("amazonaws.com.cn") => "amazonaws.com.cn".to_owned(),
        Cloud::Google if of("googleapis.com") => "googleapis.com".to_owned(),
        Cloud::Azure => {
            let account = match credentials {
                Credentials::Azure { account_name, .. } => account_name.clone(),
                _ => None,
            };
            let account = account.or_else(|| url.account.clone()).unwrap_or_default();
            match &endpoint {
                Some(host) if !of("core.windows.net") => format!("{host} {account}"),
                _ => format!("core.windows.net {account}"),
            }
        }
        Cloud::S3 | Cloud::Google => endpoint.unwrap_or_default(),
    }
}

/// Host, port and path of an endpoint.
fn host(endpoint: &str) -> String {
    let rest = endpoint
        .split_once("://")
        .map_or(endpoint, |(_, rest)| rest);
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let authority = authority.to_ascii_lowercase();
    let authority = authority
        .strip_suffix(":80")
        .or(authority.strip_suffix(":443"))
        .unwrap_or(&authority);
    let (name, port) = match authority.rsplit_once(':') {
        // Colons within brackets are those of an IPv6 address.
        Some((name, port)) if !port.ends_with(']') => (name, port),
        _ => (authority, ""),
    };
    let name = name.trim_end_matches('.');
    let is_loopback = name == "localhost" || name == "[::1]" || name.starts_with("127.");
    let mut host = if is_loopback { "localhost" } else { name }.to_owned();
    if !port.is_empty() {
        host += &format!(":{port}");
    }
    for part in path.split('/').filter(|part| !part.is_empty()) {
        host += &format!("/{part}");
    }
    host
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn place(url: &str, options: &[(&str, &str)], credentials: &[(&str, &str)]) -> Place {
        let url = StorageUrl::parse(url).unwrap();
        Place::of(&StorageConfig {
            options: StorageOptions::parse(&url, options).unwrap(),
            credentials: Credentials::parse(credentials).unwrap(),
            timeout: Duration::ZERO,
            url,
        })
    }

    fn at(url: &str) -> Place {
        place(url, &[], &[])
    }

    fn endpoint(endpoint: &str) -> Place {
        let options = [("endpoint", endpoint), ("allow_http", "on")];
        place("s3://b/p", &options, &[])
    }

    #[test]
    fn places_that_overlap() {
        let within = |path: &str| Some(Position::Within(path.to_owned()));
        for (one, other, expected) in [
            ("s3://b/p", "s3a://b/p/", Some(Position::Same)),
            ("s3://b/p/q/r", "s3://b/p", within("q/r")),
            ("s3://b/p", "s3://b/p/q", Some(Position::Around)),
            ("s3://b/p", "s3://b", within("p")),
            ("s3://b/pq", "s3://b/p", None),
            ("s3://b/p", "s3://c/p", None),
            ("s3://b/p", "gs://b/p", None),
            ("file:///nowhere//a/./b/", "file:///nowhere/a", within("b")),
            ("file:///nowhere/ab", "file:///nowhere/a", None),
            ("file:///nowhere/b", "s3://nowhere/b", None),
        ] {
            assert_eq!(at(one).position(&at(other)), expected, "{one} {other}");
        }
        assert!(at("s3://b/p/q").lies_in(&at("s3://b/p")));
        assert!(!at("s3://b/p").lies_in(&at("s3://b/p/q")));
        assert_eq!(at("s3://b/p").below("x/y"), at("s3://b/p/x/y"));
    }

    #[test]
    fn an_endpoint_has_many_spellings() {
        for (one, other) in [
            (
                "https://store.example",
                "HTTPS://Store.Example:443/".to_lowercase().as_str(),
            ),
            ("https://Store.example.", "http://store.EXAMPLE:80"),
            ("http://127.0.0.1:9000", "http://localhost:9000//"),
            ("http://[::1]:9000", "http://localhost:9000"),
            (
                "https://s3.eu-central-1.amazonaws.com",
                "https://s3.amazonaws.com",
            ),
        ] {
            assert_eq!(endpoint(one), endpoint(other), "{one} {other}");
        }
        assert_eq!(
            endpoint("https://s3.us-west-2.amazonaws.com"),
            at("s3://b/p")
        );
        for (one, other) in [
            ("http://a:9000", "http://a:9001"),
            ("http://a:9000", "http://b:9000"),
            ("https://notamazonaws.com", "https://s3.amazonaws.com"),
            (
                "https://s3.cn-north-1.amazonaws.com.cn",
                "https://s3.amazonaws.com",
            ),
        ] {
            assert_eq!(
                endpoint(one).position(&endpoint(other)),
                None,
                "{one} {other}"
            );
        }
        let china = place("s3://b/p", &[("region", "cn-north-1")], &[]);
        assert_eq!(china, endpoint("https://s3.cn-north-1.amazonaws.com.cn"));
    }

    #[test]
    fn accounts_of_azure_have_containers_of_their_own() {
        let of = |account| {
            place(
                "az://c/p",
                &[],
                &[("account_name", account), ("account_key", "k")],
            )
        };
        assert_eq!(of("one").position(&of("two")), None);
        assert_eq!(of("one"), at("abfss://c@one.dfs.core.windows.net/p"));
    }

    #[test]
    fn a_bucket_of_nobody_may_be_any() {
        let StorageUrl::Bucket(url) = StorageUrl::parse("s3://b").unwrap() else {
            panic!("no bucket")
        };
        let any = Place::of_any_bucket(&url, "p/q");
        assert!(any.lies_in(&endpoint("http://a:9000")));
        assert!(any.lies_in(&at("s3://b/p")));
        assert!(!any.lies_in(&at("s3://c/p")));
        let beside = endpoint("http://a:9000").beside(&url, "p/q");
        assert!(beside.lies_in(&endpoint("http://a:9000")));
        assert!(!beside.lies_in(&endpoint("http://b:9000")));
    }

    #[test]
    fn links_lead_to_the_same_place() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().join("real");
        fs::create_dir(&real).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(Place::of_file(&link), Place::of_file(&real));
        let inside = Place::of_file(&link.join("a/b"));
        let within = Position::Within("a/b".to_owned());
        assert_eq!(inside.position(&Place::of_file(&real)), Some(within));
        let above = Place::of_file(folder.path());
        assert!(above.resolved("link/x").lies_in(&Place::of_file(&real)));
    }

    #[test]
    fn patterns_begin_somewhere() {
        for (pattern, fixed) in [
            ("a/b/*.parquet", "a/b"),
            ("a/b.csv", "a/b.csv"),
            ("a/x?/b", "a"),
            ("**", ""),
            ("[a]/b", ""),
        ] {
            assert_eq!(fixed_part(pattern), fixed);
        }
    }
}
