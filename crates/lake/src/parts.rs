//! The default storage as an object store: objects in parts in a WAL-logged table, read through a [`PartSource`].
//!
//! Read-only: workers write the parts in the transaction that names the object in the manifest.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    Attributes, CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, Result,
};

use crate::error::LakeError;

/// Where the parts come from; asked on engine threads, answered by the main thread.
#[async_trait]
pub trait PartSource: fmt::Debug + Send + Sync + 'static {
    /// The bytes of a range that lies within the object.
    async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, LakeError>;

    /// The object's size. Asked before most reads: answer from the manifest, not from the parts.
    async fn size(&self, path: &str) -> Result<u64, LakeError>;
}

/// The object store over a source.
#[derive(Debug)]
pub struct PartStore<S> {
    source: Arc<S>,
}

impl<S: PartSource> PartStore<S> {
    pub fn new(source: Arc<S>) -> Self {
        Self { source }
    }

    async fn range(&self, location: &Path, range: Range<u64>) -> Result<Bytes> {
        let wanted = range.end - range.start;
        let bytes = self
            .source
            .get_range(location.as_ref(), range)
            .await
            .map_err(|e| to_store(location, e))?;
        if bytes.len() as u64 == wanted {
            return Ok(bytes);
        }
        let reason = format!("a part has {} bytes of {wanted}", bytes.len());
        Err(to_store(location, LakeError::corrupt("object", reason)))
    }
}

impl<S> fmt::Display for PartStore<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("rakam_local")
    }
}

fn to_store(location: &Path, error: LakeError) -> Error {
    let path = location.to_string();
    match error {
        LakeError::Missing { .. } => Error::NotFound {
            path,
            source: error.into(),
        },
        other => Error::Generic {
            store: "rakam_local",
            source: other.into(),
        },
    }
}

fn read_only() -> Error {
    Error::NotSupported {
        source: "the default storage is read-only here".into(),
    }
}

#[async_trait]
impl<S: PartSource> ObjectStore for PartStore<S> {
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        if options.version.is_some() {
            return Err(read_only());
        }
        let size = self
            .source
            .size(location.as_ref())
            .await
            .map_err(|e| to_store(location, e))?;
        let meta = ObjectMeta {
            location: location.clone(),
            // Objects never change: there is no later version to tell from an earlier one.
            last_modified: chrono::DateTime::UNIX_EPOCH,
            size,
            e_tag: None,
            version: None,
        };
        options.check_preconditions(&meta)?;
        let range = match &options.range {
            Some(range) => range.as_range(size).map_err(|e| Error::Generic {
                store: "rakam_local",
                source: e.into(),
            })?,
            None => 0..size,
        };
        let payload = if options.head || range.is_empty() {
            stream::empty().boxed()
        } else {
            let bytes = self.range(location, range.clone()).await?;
            stream::iter([Ok(bytes)]).boxed()
        };
        Ok(GetResult {
            payload: GetResultPayload::Stream(payload),
            meta,
            range,
            attributes: Attributes::new(),
        })
    }

    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        Err(read_only())
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(read_only())
    }

    fn delete_stream(
        &self,
        _: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        stream::iter([Err(read_only())]).boxed()
    }

    fn list(&self, _: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        stream::iter([Err(read_only())]).boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(read_only())
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(read_only())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::{GetRange, ObjectStoreExt};

    /// One object, `data`, of ten bytes.
    #[derive(Debug)]
    struct Source;

    #[async_trait]
    impl PartSource for Source {
        async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, LakeError> {
            if path == "short" {
                return Ok(Bytes::new());
            }
            Ok(Bytes::from_static(b"0123456789").slice(range.start as usize..range.end as usize))
        }

        async fn size(&self, path: &str) -> Result<u64, LakeError> {
            match path {
                "data" | "short" => Ok(10),
                _ => Err(LakeError::Missing { path: path.into() }),
            }
        }
    }

    #[tokio::test]
    async fn ranges_are_read() {
        let store = PartStore::new(Arc::new(Source));
        let data = Path::from("data");
        assert_eq!(store.get_range(&data, 2..5).await.unwrap(), "234");
        let ranges = store.get_ranges(&data, &[0..1, 8..10]).await.unwrap();
        assert_eq!(ranges, ["0", "89"]);
        assert_eq!(
            store.get(&data).await.unwrap().bytes().await.unwrap(),
            "0123456789"
        );
        assert_eq!(store.head(&data).await.unwrap().size, 10);
        let suffix = GetOptions {
            range: Some(GetRange::Suffix(3)),
            ..Default::default()
        };
        let suffix = store.get_opts(&data, suffix).await.unwrap();
        assert_eq!(suffix.bytes().await.unwrap(), "789");
        assert!(store.get_range(&data, 10..12).await.is_err());
    }

    #[tokio::test]
    async fn errors_keep_their_meaning() {
        let store = PartStore::new(Arc::new(Source));
        let error = store.get(&Path::from("other")).await.unwrap_err();
        assert_eq!(
            LakeError::of_store("read", "other", error).sqlstate(),
            "58P01"
        );
        let error = store
            .get_range(&Path::from("short"), 0..4)
            .await
            .unwrap_err();
        assert_eq!(
            LakeError::of_store("read", "short", error).sqlstate(),
            "XX001"
        );
        let refused = store
            .put(&Path::from("data"), "x".into())
            .await
            .unwrap_err();
        assert!(matches!(refused, Error::NotSupported { .. }));
        assert!(store.delete(&Path::from("data")).await.is_err());
        assert!(store.list(None).next().await.unwrap().is_err());
    }

    /// The Parquet reader sees no difference.
    #[tokio::test]
    async fn parquet_is_read_through_it() {
        use futures::TryStreamExt;
        use parquet::arrow::async_reader::{ParquetObjectReader, ParquetRecordBatchStreamBuilder};

        #[derive(Debug)]
        struct File(Bytes);
        #[async_trait]
        impl PartSource for File {
            async fn get_range(&self, _: &str, range: Range<u64>) -> Result<Bytes, LakeError> {
                Ok(self.0.slice(range.start as usize..range.end as usize))
            }
            async fn size(&self, _: &str) -> Result<u64, LakeError> {
                Ok(self.0.len() as u64)
            }
        }
        let (_, data) = crate::write::tests::written(1234, 31);
        let store = Arc::new(PartStore::new(Arc::new(File(data))));
        let reader = ParquetObjectReader::new(store, Path::from("f"));
        let stream = ParquetRecordBatchStreamBuilder::new(reader).await.unwrap();
        let batches: Vec<_> = stream.build().unwrap().try_collect().await.unwrap();
        assert_eq!(batches.iter().map(|b| b.num_rows()).sum::<usize>(), 1234);
    }
}
