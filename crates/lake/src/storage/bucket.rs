//! A bucket as a storage: S3 and what speaks its protocol, Google's, Azure's.
//!
//! Every call is repeated with growing pauses while its failure may pass, for as long as the storage's timeout. Names are
//! used once and objects never change, so a call whose answer was lost is repeated and its effect recognised by content.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{
    BackoffConfig, Certificate, ClientOptions, Error, GetRange, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutOptions, PutPayload, RetryConfig, UpdateVersion,
};
use uuid::Uuid;

use super::options::{AzureSecret, Credentials};
use super::reason::{Meaning, explain};
use super::uploads::{Marker, Uploads};
use super::{ObjectInfo, PutIf, StorageConfig, Upload, Version, check_path};
use crate::error::LakeError;
use crate::storage::url::{BucketUrl, Cloud};

/// Larger objects go up in parts of this size, which a lost connection repeats alone.
pub const PART_BYTES: usize = 8 << 20;
/// Parts on their way at a time; they are slices of the object, no copies.
pub(super) const PARTS_AT_A_TIME: usize = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// One request: a part must get through within it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const POOL_IDLE: Duration = Duration::from_secs(30);

pub(super) struct Bucket {
    prefix: Path,
    store: Arc<dyn ObjectStore>,
    pub(super) parts: Arc<dyn MultipartStore>,
    /// None: the store cannot list unfinished uploads.
    uploads: Option<Uploads>,
    pub(super) timeout: Duration,
}

/// The store's own would show credentials.
impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bucket")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

type Result<T, E = LakeError> = std::result::Result<T, E>;

impl Bucket {
    pub(super) fn open(url: &BucketUrl, config: &StorageConfig) -> Result<Self> {
        config.credentials.check_for(url.cloud)?;
        let client = client_options(config)?;
        let retry = RetryConfig {
            backoff: BackoffConfig {
                init_backoff: FIRST_PAUSE,
                max_backoff: LONGEST_PAUSE,
                base: 2.0,
            },
            max_retries: 10,
            retry_timeout: config.timeout,
        };
        let (store, parts, uploads): (Arc<dyn ObjectStore>, Arc<dyn MultipartStore>, _) =
            match url.cloud {
                Cloud::S3 => {
                    let region = region(config);
                    let store = s3(url, config, &region)
                        .with_client_options(client.clone())
                        .with_retry(retry)
                        .build()
                        .map_err(unfit)?;
                    let uploads = Uploads::new(store.clone(), &client, region).map_err(unfit)?;
                    (Arc::new(store.clone()), Arc::new(store), Some(uploads))
                }
                Cloud::Google => {
                    let store = Arc::new(
                        google(url, config)
                            .with_client_options(client)
                            .with_retry(retry)
                            .build()
                            .map_err(unfit)?,
                    );
                    (Arc::clone(&store) as _, store, None)
                }
                Cloud::Azure => {
                    let store = Arc::new(
                        azure(url, config)?
                            .with_client_options(client)
                            .with_retry(retry)
                            .build()
                            .map_err(unfit)?,
                    );
                    (Arc::clone(&store) as _, store, None)
                }
            };
        Ok(Self {
            prefix: Path::parse(&url.prefix).map_err(unfit)?,
            store,
            parts,
            uploads,
            timeout: config.timeout,
        })
    }

    /// The storage as an object store rooted at its prefix.
    pub(super) fn object_store(&self) -> Arc<dyn ObjectStore> {
        if self.prefix.as_ref().is_empty() {
            Arc::clone(&self.store)
        } else {
            Arc::new(PrefixStore::new(
                Arc::clone(&self.store),
                self.prefix.clone(),
            ))
        }
    }

    pub(super) async fn check(&self) -> Result<()> {
        self.retry("list", "", || async {
            let mut objects = self.store.list(Some(&self.prefix));
            objects.try_next().await.map(drop)
        })
        .await
    }

    pub(super) async fn put(&self, path: &str, data: Bytes) -> Result<()> {
        let location = self.location(path)?;
        if data.len() > PART_BYTES {
            return self.put_in_parts(path, &location, data).await;
        }
        let mut mode = PutMode::Create;
        let mut pause = Pause::new(self.timeout);
        loop {
            let options = PutOptions::from(mode.clone());
            let put = self
                .store
                .put_opts(&location, data.clone().into(), options)
                .await;
            let Err(error) = put else { return Ok(()) };
            match explain(&error).meaning {
                // Perhaps by ourselves, and only the answer was lost.
                Meaning::Exists | Meaning::Changed => {
                    return if self.holds(path, &data).await? {
                        Ok(())
                    } else {
                        Err(LakeError::Exists {
                            path: path.to_owned(),
                        })
                    };
                }
                // Not every store has conditions. Names are never used twice: without one, nothing is lost.
                Meaning::Unsupported if mode == PutMode::Create => mode = PutMode::Overwrite,
                Meaning::Transient if pause.take().await => {}
                _ => return Err(LakeError::of_store("write", path, error)),
            }
        }
    }

    async fn put_in_parts(&self, path: &str, location: &Path, data: Bytes) -> Result<()> {
        let id = self
            .retry("write", path, || self.parts.create_multipart(location))
            .await?;
        let sent = self.send_parts(path, location, &id, &data).await;
        if sent.is_err() {
            // As well as may be: what stays is found by the list of uploads.
            let _ = self.parts.abort_multipart(location, &id).await;
        }
        sent
    }

    async fn send_parts(
        &self,
        path: &str,
        location: &Path,
        id: &String,
        data: &Bytes,
    ) -> Result<()> {
        let offsets: Vec<usize> = (0..data.len()).step_by(PART_BYTES).collect();
        let parts: Vec<_> = stream::iter(offsets.into_iter().enumerate())
            .map(|(index, offset)| async move {
                let part = data.slice(offset..data.len().min(offset + PART_BYTES));
                self.retry("write", path, || {
                    self.parts
                        .put_part(location, id, index, PutPayload::from(part.clone()))
                })
                .await
            })
            .buffered(PARTS_AT_A_TIME)
            .try_collect()
            .await?;
        let mut pause = Pause::new(self.timeout);
        loop {
            let done = self
                .parts
                .complete_multipart(location, id, parts.clone())
                .await;
            let Err(error) = done else { return Ok(()) };
            match explain(&error).meaning {
                // An upload is gone once it is complete: perhaps only the answer was lost.
                Meaning::Missing if self.holds(path, data).await? => return Ok(()),
                Meaning::Transient if pause.take().await => {}
                Meaning::Missing => {
                    return Err(LakeError::Unreachable {
                        action: "write",
                        path: path.to_owned(),
                        reason: "the upload was aborted".to_owned(),
                    });
                }
                _ => return Err(LakeError::of_store("write", path, error)),
            }
        }
    }

    /// Whether the object is there with exactly this content.
    async fn holds(&self, path: &str, data: &Bytes) -> Result<bool> {
        match self.read(path, None).await {
            Ok((found, _)) => Ok(found == *data),
            Err(LakeError::Missing { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    pub(super) async fn read(
        &self,
        path: &str,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<(Bytes, ObjectMeta)> {
        let location = &self.location(path)?;
        let (bytes, meta) = self
            .retry("read", path, || {
                let options = object_store::GetOptions {
                    range: range.clone().map(GetRange::Bounded),
                    ..Default::default()
                };
                async move {
                    let answer = self.store.get_opts(location, options).await?;
                    let (meta, wanted) = (answer.meta.clone(), answer.range.clone());
                    let bytes = answer.bytes().await?;
                    if bytes.len() as u64 != wanted.end - wanted.start {
                        return Err(Error::Generic {
                            store: "bucket",
                            source: "the answer was cut short".into(),
                        });
                    }
                    Ok((bytes, meta))
                }
            })
            .await?;
        match range {
            Some(range) if range.end > meta.size => {
                Err(LakeError::corrupt("object", "it ends before the range"))
            }
            _ => Ok((bytes, meta)),
        }
    }

    pub(super) async fn head(&self, path: &str) -> Result<ObjectInfo> {
        let location = self.location(path)?;
        let meta = self
            .retry("read", path, || self.store.head(&location))
            .await?;
        Ok(info(path.to_owned(), &meta))
    }

    pub(super) async fn delete(&self, path: &str) -> Result<()> {
        let location = self.location(path)?;
        match self
            .retry("delete", path, || self.store.delete(&location))
            .await
        {
            Err(LakeError::Missing { .. }) => Ok(()),
            outcome => outcome,
        }
    }

    /// Deletes an object and gives up every upload of it.
    pub(super) async fn discard(&self, path: &str) -> Result<()> {
        for id in self.uploads_of(&self.location(path)?).await? {
            self.abort_upload_of(path, &id).await?;
        }
        self.delete(path).await
    }

    /// Objects below a path in the order of their names. A page that fails is asked for again, from the last name on.
    pub(super) fn list(
        self: &Arc<Self>,
        prefix: &str,
    ) -> Result<BoxStream<'static, Result<ObjectInfo>>> {
        let below = if prefix.is_empty() {
            self.prefix.clone()
        } else {
            self.location(prefix)?
        };
        let state = Listing {
            bucket: Arc::clone(self),
            objects: self.store.list(Some(&below)),
            below,
            last: None,
            pause: Pause::new(self.timeout),
        };
        Ok(stream::try_unfold(state, |mut state| async move {
            Ok(state.next().await?.map(|object| (object, state)))
        })
        .boxed())
    }

    pub(super) async fn list_uploads(&self) -> Result<Option<Vec<Upload>>> {
        let mut prefix = self.prefix.to_string();
        if !prefix.is_empty() {
            prefix.push('/');
        }
        let found = self.uploads_at(&prefix).await?;
        Ok(found.map(|all| {
            let own = all.into_iter().filter_map(|upload| {
                let path = upload.path.strip_prefix(&prefix)?.to_owned();
                Some(Upload { path, ..upload })
            });
            own.collect()
        }))
    }

    /// The uploads of one object, by their ids; none where the store cannot list them.
    pub(super) async fn uploads_of(&self, location: &Path) -> Result<Vec<String>> {
        let found = self
            .uploads_at(location.as_ref())
            .await?
            .unwrap_or_default();
        let own = found.into_iter().filter(|u| u.path == location.as_ref());
        Ok(own.map(|upload| upload.id).collect())
    }

    /// The uploads of keys that begin like this, with whole keys as their paths.
    async fn uploads_at(&self, prefix: &str) -> Result<Option<Vec<Upload>>> {
        let Some(uploads) = &self.uploads else {
            return Ok(None);
        };
        let (mut found, mut marker) = (Vec::new(), Marker::default());
        loop {
            let page = self.retry_explained(|| uploads.page(prefix, &marker)).await;
            let (page, next) = match page {
                Ok(page) => page,
                Err(error) if explain(&error).meaning == Meaning::Unsupported => return Ok(None),
                Err(error) => return Err(LakeError::of_store("list", "", error)),
            };
            found.extend(page);
            match next {
                Some(next) => marker = next,
                None => return Ok(Some(found)),
            }
        }
    }

    pub(super) async fn abort_upload(&self, upload: &Upload) -> Result<()> {
        self.abort_upload_of(&upload.path, &upload.id).await
    }

    async fn abort_upload_of(&self, path: &str, id: &String) -> Result<()> {
        let location = self.location(path)?;
        let aborted = self
            .retry("abort the upload of", path, || {
                self.parts.abort_multipart(&location, id)
            })
            .await;
        match aborted {
            Err(LakeError::Missing { .. }) => Ok(()),
            outcome => outcome,
        }
    }

    pub(super) async fn put_if(
        &self,
        path: &str,
        data: Bytes,
        expected: Option<&Version>,
    ) -> Result<PutIf> {
        let location = self.location(path)?;
        let mode = match expected {
            None => PutMode::Create,
            Some(Version(version)) => PutMode::Update(version.clone()),
        };
        let mut pause = Pause::new(self.timeout);
        loop {
            let options = PutOptions::from(mode.clone());
            match self
                .store
                .put_opts(&location, data.clone().into(), options)
                .await
            {
                Ok(_) => return Ok(PutIf::Written),
                Err(error) => match explain(&error).meaning {
                    Meaning::Exists | Meaning::Changed => {
                        return self.written_by_us(path, &data).await;
                    }
                    Meaning::Unsupported => return Ok(PutIf::Unsupported),
                    Meaning::Transient if pause.take().await => {}
                    _ => return Err(LakeError::of_store("write", path, error)),
                },
            }
        }
    }

    /// After a condition did not hold: it was our own write if the content is ours and only the answer was lost.
    async fn written_by_us(&self, path: &str, data: &Bytes) -> Result<PutIf> {
        match self.read(path, None).await {
            Ok((found, _)) if found == *data => Ok(PutIf::Written),
            Ok(_) | Err(LakeError::Missing { .. }) => Ok(PutIf::Conflict),
            Err(e) => Err(e),
        }
    }

    /// The whole name of an object. Only plain components: nothing leads out of the prefix.
    pub(super) fn location(&self, path: &str) -> Result<Path> {
        check_path(path)?;
        let whole = if self.prefix.as_ref().is_empty() {
            path.to_owned()
        } else {
            format!("{}/{path}", self.prefix)
        };
        Path::parse(whole).map_err(|_| LakeError::InvalidPath {
            path: path.to_owned(),
        })
    }

    /// Repeats a call while its failure may pass.
    pub(super) async fn retry<T, F>(
        &self,
        action: &'static str,
        path: &str,
        call: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, Error>>,
    {
        self.retry_explained(call)
            .await
            .map_err(|e| LakeError::of_store(action, path, e))
    }

    async fn retry_explained<T, F>(&self, mut call: impl FnMut() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut pause = Pause::new(self.timeout);
        loop {
            let error = match call().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if explain(&error).meaning != Meaning::Transient || !pause.take().await {
                return Err(error);
            }
        }
    }
}

/// A list in progress.
struct Listing {
    bucket: Arc<Bucket>,
    below: Path,
    objects: BoxStream<'static, object_store::Result<ObjectMeta>>,
    last: Option<Path>,
    pause: Pause,
}

impl Listing {
    async fn next(&mut self) -> Result<Option<ObjectInfo>> {
        loop {
            let error = match self.objects.next().await {
                None => return Ok(None),
                Some(Ok(meta)) => {
                    self.pause = Pause::new(self.bucket.timeout);
                    self.last = Some(meta.location.clone());
                    let own = meta.location.prefix_match(&self.bucket.prefix);
                    let Some(path) = own.map(|parts| parts.collect::<Path>()) else {
                        continue;
                    };
                    return Ok(Some(info(path.to_string(), &meta)));
                }
                Some(Err(error)) => error,
            };
            if explain(&error).meaning != Meaning::Transient || !self.pause.take().await {
                return Err(LakeError::of_store("list", "", error));
            }
            self.objects = match &self.last {
                Some(last) => self.bucket.store.list_with_offset(Some(&self.below), last),
                None => self.bucket.store.list(Some(&self.below)),
            };
        }
    }
}

/// The pauses between the attempts of one call.
pub(super) struct Pause {
    next: Duration,
    end: Instant,
}

impl Pause {
    pub(super) fn new(timeout: Duration) -> Self {
        Self {
            next: FIRST_PAUSE,
            end: Instant::now() + timeout,
        }
    }

    /// Waits; false: it has taken too long already.
    pub(super) async fn take(&mut self) -> bool {
        // Spread, so that many who failed together do not come back together.
        let spread = 0.5 + (Uuid::new_v4().as_u128() % 1000) as f64 / 1000.0;
        let pause = self.next.mul_f64(spread);
        if Instant::now() + pause >= self.end {
            return false;
        }
        tokio::time::sleep(pause).await;
        self.next = (self.next * 2).min(LONGEST_PAUSE);
        true
    }
}

fn info(path: String, meta: &ObjectMeta) -> ObjectInfo {
    ObjectInfo {
        path,
        bytes: meta.size,
        modified: SystemTime::from(meta.last_modified),
        version: Some(version(meta)),
    }
}

pub(super) fn version(meta: &ObjectMeta) -> Version {
    Version(UpdateVersion {
        e_tag: meta.e_tag.clone(),
        version: meta.version.clone(),
    })
}

/// What the builder of a store says of options that were checked already: it may name values, so it is not repeated.
fn unfit(_: impl std::error::Error) -> LakeError {
    LakeError::InvalidOption {
        message: "the options or credentials of the storage cannot be used".to_owned(),
        hint: "Check the options of the server and of the user mapping of its owner.".to_owned(),
    }
}

fn client_options(config: &StorageConfig) -> Result<ClientOptions> {
    let mut client = ClientOptions::new()
        .with_allow_http(config.options.allow_http)
        .with_timeout(REQUEST_TIMEOUT.min(config.timeout))
        .with_connect_timeout(CONNECT_TIMEOUT.min(config.timeout))
        .with_pool_idle_timeout(POOL_IDLE);
    if let Some(file) = &config.options.ca_file {
        let bad = || LakeError::InvalidOption {
            message: "the file of option \"ca_file\" cannot be used".to_owned(),
            hint: "It must be readable by the server and hold certificates in PEM format."
                .to_owned(),
        };
        let text = std::fs::read(file).map_err(|_| bad())?;
        let certificates = Certificate::from_pem_bundle(&text).map_err(|_| bad())?;
        if certificates.is_empty() {
            return Err(bad());
        }
        for certificate in certificates {
            client = client.with_root_certificate(certificate);
        }
    }
    Ok(client)
}

fn region(config: &StorageConfig) -> String {
    let environment = || {
        ["AWS_REGION", "AWS_DEFAULT_REGION"]
            .iter()
            .find_map(|name| std::env::var(name).ok())
    };
    config
        .options
        .region
        .clone()
        .or_else(environment)
        .unwrap_or_else(|| "us-east-1".to_owned())
}

fn s3(url: &BucketUrl, config: &StorageConfig, region: &str) -> AmazonS3Builder {
    let options = &config.options;
    let mut builder = match &config.credentials {
        Credentials::S3 {
            access_key_id,
            secret_access_key,
            session_token,
        } => {
            let builder = AmazonS3Builder::new()
                .with_access_key_id(access_key_id)
                .with_secret_access_key(secret_access_key);
            match session_token {
                Some(token) => builder.with_token(token),
                None => builder,
            }
        }
        _ => AmazonS3Builder::from_env(),
    };
    builder = builder.with_bucket_name(&url.bucket).with_region(region);
    // Amazon wants the bucket in the host name (where certificates allow it), other stores rarely do.
    let path_style = options
        .path_style
        .unwrap_or(options.endpoint.is_some() || url.bucket.contains('.'));
    builder = builder.with_virtual_hosted_style_request(!path_style);
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(match endpoint.split_once("://") {
            Some((scheme, host)) if !path_style => format!("{scheme}://{}.{host}", url.bucket),
            _ => endpoint.clone(),
        });
    }
    for (key, value) in [
        ("aws_server_side_encryption", options.sse.clone()),
        ("aws_sse_kms_key_id", options.sse_kms_key_id.clone()),
        (
            "aws_sse_bucket_key_enabled",
            options.sse_bucket_key.map(|on| on.to_string()),
        ),
    ] {
        if let (Ok(key), Some(value)) = (key.parse::<AmazonS3ConfigKey>(), value) {
            builder = builder.with_config(key, value);
        }
    }
    builder
}

fn google(url: &BucketUrl, config: &StorageConfig) -> GoogleCloudStorageBuilder {
    let mut builder = match &config.credentials {
        Credentials::Google {
            service_account_key,
        } => GoogleCloudStorageBuilder::new().with_service_account_key(service_account_key),
        _ => GoogleCloudStorageBuilder::from_env(),
    };
    if let Some(endpoint) = &config.options.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    builder.with_bucket_name(&url.bucket)
}

fn azure(url: &BucketUrl, config: &StorageConfig) -> Result<MicrosoftAzureBuilder> {
    let mut builder = MicrosoftAzureBuilder::from_env();
    let mut account = url.account.clone();
    if let Credentials::Azure {
        account_name,
        secret,
    } = &config.credentials
    {
        if !matches!(secret, AzureSecret::Chain) {
            builder = MicrosoftAzureBuilder::new();
        }
        builder = match secret {
            AzureSecret::AccountKey(key) => builder.with_access_key(key),
            AzureSecret::Sas(pairs) => builder.with_sas_authorization(pairs.clone()),
            AzureSecret::Chain => builder,
        };
        if let (Some(given), Some(named)) = (account_name, &account)
            && given != named
        {
            return Err(LakeError::InvalidOption {
                message: "the url and the user mapping name different accounts".to_owned(),
                hint: "Leave one of them out.".to_owned(),
            });
        }
        account = account_name.clone().or(account);
    }
    if let Some(account) = account {
        builder = builder.with_account(account);
    }
    if let Some(endpoint) = &config.options.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    Ok(builder.with_container_name(&url.bucket))
}
