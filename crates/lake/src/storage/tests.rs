//! One suite that every kind of storage passes: a directory here, and buckets where the environment names one
//! (`RAKAM_TEST_S3`: an endpoint; `S3_BUCKET`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` with it; `RAKAM_TEST_URL` and
//! `RAKAM_TEST_OPTIONS`, `RAKAM_TEST_CREDENTIALS` as `name=value` lines for any other).

use futures::TryStreamExt;
use object_store::ObjectStoreExt;

use super::*;

/// Larger than one request: goes up in parts, the last of them short.
const LARGE: usize = (20 << 20) + 17;

fn large() -> Bytes {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    std::iter::repeat_with(next)
        .take(LARGE)
        .collect::<Vec<u8>>()
        .into()
}

async fn paths(storage: &Storage, prefix: &str) -> Vec<String> {
    let mut found: Vec<String> = storage
        .list(prefix)
        .map_ok(|object| object.path)
        .try_collect()
        .await
        .unwrap();
    found.sort();
    found
}

async fn conformance(config: &StorageConfig) {
    let storage = Storage::open(config).unwrap();
    storage.prepare().await.unwrap();
    storage.check().await.unwrap();
    assert!(paths(&storage, "").await.is_empty());

    // Names with everything that the layout uses.
    let path = "acme/page!20view/day=2026-01-01/x.parquet";
    let hello = Bytes::from_static(b"hello, lake");
    storage.put(path, hello.clone()).await.unwrap();
    storage.put(path, hello.clone()).await.unwrap();
    let other = storage.put(path, Bytes::from_static(b"other")).await;
    assert_eq!(other.unwrap_err().sqlstate(), "58P02");
    assert_eq!(storage.get(path).await.unwrap(), hello);
    assert_eq!(storage.get_range(path, 7..11).await.unwrap(), "lake");
    assert!(storage.get_range(path, 7..12).await.is_err());
    assert_eq!(storage.head(path).await.unwrap().bytes, 11);
    storage.put("acme/empty", Bytes::new()).await.unwrap();
    assert_eq!(storage.get("acme/empty").await.unwrap(), "");

    for missing in ["acme/none", "acme"] {
        assert_eq!(storage.get(missing).await.unwrap_err().sqlstate(), "58P01");
        assert_eq!(storage.head(missing).await.unwrap_err().sqlstate(), "58P01");
        assert_eq!(storage.get_versioned(missing).await.unwrap(), None);
    }
    storage.delete("acme/none").await.unwrap();
    for bad in ["", "../x", "/x", "a//b", "a/./b"] {
        assert_eq!(storage.get(bad).await.unwrap_err().sqlstate(), "22023");
        assert_eq!(
            storage
                .put(bad, hello.clone())
                .await
                .unwrap_err()
                .sqlstate(),
            "22023"
        );
    }

    // In parts.
    let data = large();
    storage.put("other/large", data.clone()).await.unwrap();
    storage.put("other/large", data.clone()).await.unwrap();
    assert!(storage.get("other/large").await.unwrap() == data);
    let middle = 8 << 20..(8 << 20) + 1000;
    assert_eq!(
        storage
            .get_range("other/large", middle.clone())
            .await
            .unwrap(),
        data.slice(middle.start as usize..middle.end as usize)
    );
    if let Some(uploads) = storage.list_uploads().await.unwrap() {
        assert_eq!(uploads, []);
    }

    assert_eq!(
        paths(&storage, "").await,
        ["acme/empty", path, "other/large"]
    );
    assert_eq!(paths(&storage, "acme").await, ["acme/empty", path]);
    assert!(paths(&storage, "acm").await.is_empty());

    // The same place through object_store.
    let reader = storage.object_store().unwrap();
    let location = object_store::path::Path::parse(path).unwrap();
    assert_eq!(reader.get_range(&location, 0..5).await.unwrap(), "hello");
    let ranges = reader
        .get_ranges(&"other/large".into(), &[5..10, 9_000_000..9_000_001])
        .await
        .unwrap();
    assert_eq!(
        ranges,
        [data.slice(5..10), data.slice(9_000_000..9_000_001)]
    );
    let missing = reader.get(&"acme/none".into()).await.unwrap_err();
    assert_eq!(
        LakeError::of_store("read", "acme/none", missing).sqlstate(),
        "58P01"
    );

    if storage.is_remote() {
        making(&storage, &data).await;
        discarded(&storage, &data).await;
    }
    conditions(&storage).await;
    many(&storage).await;

    for path in paths(&storage, "").await {
        storage.delete(&path).await.unwrap();
        storage.delete(&path).await.unwrap();
    }
    assert!(paths(&storage, "").await.is_empty());
}

/// An object that comes in parts, small and large, completed and given up.
async fn making(storage: &Storage, data: &Bytes) {
    let path = "other/made";
    for size in [0, 10, PART_BYTES, data.len()] {
        let mut made = storage.make(path).await.unwrap();
        let mut rest = data.slice(..size);
        while rest.len() > PART_BYTES {
            made.part(rest.split_to(PART_BYTES)).await.unwrap();
        }
        assert_eq!(storage.head(path).await.unwrap_err().sqlstate(), "58P01");
        made.complete(rest).await.unwrap();
        assert!(storage.get(path).await.unwrap() == data.slice(..size));
        let other = storage.make(path).await.map(drop);
        assert_eq!(other.unwrap_err().sqlstate(), "58P02");
        storage.delete(path).await.unwrap();

        let mut made = storage.make(path).await.unwrap();
        if size > PART_BYTES {
            made.part(data.slice(..PART_BYTES)).await.unwrap();
        }
        // Somebody else was first: the object is not ours to take back.
        storage.put(path, data.slice(..size / 2)).await.unwrap();
        let late = made.complete(data.slice(..size)).await;
        if size > 1 {
            assert_eq!(late.unwrap_err().sqlstate(), "58P02");
        }
        made.give_up().await.unwrap();
        if size > 1 {
            assert_eq!(storage.head(path).await.unwrap().bytes as usize, size / 2);
        }
        storage.delete(path).await.unwrap();
        if let Some(uploads) = storage.list_uploads().await.unwrap() {
            assert_eq!(uploads, []);
        }
    }
}

/// Half an object, whose writer died.
async fn discarded(storage: &Storage, data: &Bytes) {
    let (path, other) = ("other/half", "other/half-of-another");
    for path in [path, other] {
        let mut made = storage.make(path).await.unwrap();
        made.part(data.slice(..PART_BYTES)).await.unwrap();
        std::mem::forget(made);
    }
    storage.discard(path).await.unwrap();
    if let Some(uploads) = storage.list_uploads().await.unwrap() {
        assert_eq!(uploads.iter().map(|u| &u.path).collect::<Vec<_>>(), [other]);
    }
    storage.discard(other).await.unwrap();
    if let Some(uploads) = storage.list_uploads().await.unwrap() {
        assert_eq!(uploads, []);
    }
}

/// A small object with one owner at a time.
async fn conditions(storage: &Storage) {
    assert!(storage.writes_conditionally().await.unwrap());
    let path = "_rakam/owner.json";
    let put = |text: &'static str, version: Option<Version>| async move {
        let bytes = Bytes::from_static(text.as_bytes());
        storage.put_if(path, bytes, version.as_ref()).await.unwrap()
    };
    assert_eq!(put("a", None).await, PutIf::Written);
    assert_eq!(put("b", None).await, PutIf::Conflict);
    // As after a lost answer.
    assert_eq!(put("a", None).await, PutIf::Written);
    let (bytes, first) = storage.get_versioned(path).await.unwrap().unwrap();
    assert_eq!(bytes, "a");
    assert_eq!(put("b", Some(first.clone())).await, PutIf::Written);
    assert_eq!(put("c", Some(first.clone())).await, PutIf::Conflict);
    storage.delete(path).await.unwrap();
    assert_eq!(put("c", Some(first)).await, PutIf::Conflict);
    let racing = (0..8).map(|n| {
        let bytes = Bytes::from(format!("racer {n}"));
        async move { storage.put_if(path, bytes, None).await.unwrap() }
    });
    let won = futures::future::join_all(racing).await;
    assert_eq!(won.iter().filter(|put| **put == PutIf::Written).count(), 1);
    storage.delete(path).await.unwrap();
    // What the lock of a directory leaves is no object.
    storage.delete("_rakam/owner.json.lock").await.unwrap();
    for path in paths(storage, "_rakam").await {
        storage.delete(&path).await.unwrap();
    }
}

/// More than one page of a list.
async fn many(storage: &Storage) {
    let names: Vec<String> = (0..1_100).map(|n| format!("many/{n:04}")).collect();
    stream::iter(names.clone())
        .map(|name| async move { storage.put(&name, Bytes::from_static(b"x")).await })
        .buffer_unordered(16)
        .try_collect::<Vec<_>>()
        .await
        .unwrap();
    assert_eq!(paths(storage, "many").await, names);
    stream::iter(names)
        .map(|name| async move { storage.delete(&name).await })
        .buffer_unordered(16)
        .try_collect::<Vec<_>>()
        .await
        .unwrap();
    assert!(paths(storage, "many").await.is_empty());
}

fn config(url: &str, options: &[(&str, &str)], credentials: &[(&str, &str)]) -> StorageConfig {
    let url = StorageUrl::parse(url).unwrap();
    StorageConfig {
        options: StorageOptions::parse(&url, options).unwrap(),
        credentials: Credentials::parse(credentials).unwrap(),
        timeout: Duration::from_secs(20),
        url,
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The S3 service of the environment, below a prefix of its own.
fn s3(prefix: &str) -> Option<StorageConfig> {
    let endpoint = variable("RAKAM_TEST_S3")?;
    let [bucket, key, secret] = ["S3_BUCKET", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
        .map(|name| variable(name).unwrap_or_default());
    Some(config(
        &format!("s3://{bucket}/{prefix}-{}", Uuid::now_v7()),
        &[
            ("endpoint", &endpoint),
            ("allow_http", "true"),
            ("region", "us-east-1"),
        ],
        &[("access_key_id", &key), ("secret_access_key", &secret)],
    ))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_conforms() {
    let dir = tempfile::tempdir().unwrap();
    conformance(&config(
        &format!("file://{}/lake", dir.path().display()),
        &[],
        &[],
    ))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_conforms() {
    if let Some(config) = s3("conformance") {
        conformance(&config).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_named_storage_conforms() {
    let Some(url) = variable("RAKAM_TEST_URL") else {
        return;
    };
    let read = |name: &str| variable(name).unwrap_or_default();
    let (options, credentials) = (read("RAKAM_TEST_OPTIONS"), read("RAKAM_TEST_CREDENTIALS"));
    fn pairs(text: &str) -> Vec<(&str, &str)> {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .collect()
    }
    let url = format!("{url}/conformance-{}", Uuid::now_v7());
    conformance(&config(&url, &pairs(&options), &pairs(&credentials))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_uploads_are_found_and_aborted() {
    let Some(config) = s3("uploads") else { return };
    let storage = Storage::open(&config).unwrap();
    let reader = storage.object_store().unwrap();
    for name in ["a/one", "b/two"] {
        let mut upload = reader.put_multipart(&name.into()).await.unwrap();
        upload.put_part(vec![1; 5 << 20].into()).await.unwrap();
    }
    let Some(mut uploads) = storage.list_uploads().await.unwrap() else {
        return;
    };
    uploads.sort_by(|a, b| a.path.cmp(&b.path));
    let found: Vec<&str> = uploads.iter().map(|upload| upload.path.as_str()).collect();
    assert_eq!(found, ["a/one", "b/two"]);
    assert!(paths(&storage, "").await.is_empty());
    for upload in &uploads {
        storage.abort_upload(upload).await.unwrap();
        storage.abort_upload(upload).await.unwrap();
    }
    assert_eq!(storage.list_uploads().await.unwrap(), Some(Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_an_error_in_time_and_names_nothing() {
    let secret = "hunter2";
    let mut config = config(
        "s3://bucket/prefix",
        &[("endpoint", "http://127.0.0.1:9"), ("allow_http", "true")],
        &[("access_key_id", secret), ("secret_access_key", secret)],
    );
    config.timeout = Duration::from_millis(300);
    let storage = Storage::open(&config).unwrap();
    let listed: Result<Vec<ObjectInfo>, LakeError> = storage.list("").try_collect().await;
    for error in [
        storage
            .put("a", Bytes::from_static(b"x"))
            .await
            .unwrap_err(),
        storage.put("a", large()).await.unwrap_err(),
        storage.get("a").await.unwrap_err(),
        storage.delete("a").await.unwrap_err(),
        storage.check().await.unwrap_err(),
        storage.list_uploads().await.unwrap_err(),
        storage.put_if("a", Bytes::new(), None).await.unwrap_err(),
        listed.unwrap_err(),
    ] {
        assert_eq!(error.sqlstate(), "58030");
        let text = format!("{error} {error:?} {config:?} {storage:?}");
        assert!(
            !text.contains(secret) && !error.to_string().contains("127.0.0.1"),
            "{text}"
        );
    }
}

#[test]
fn credentials_of_another_cloud_are_refused() {
    let config = StorageConfig {
        url: StorageUrl::parse("s3://b").unwrap(),
        ..config(
            "az://b",
            &[],
            &[("account_name", "a"), ("account_key", "aGVsbG8=")],
        )
    };
    assert_eq!(Storage::open(&config).unwrap_err().sqlstate(), "22023");
}
