//! Uploads in parts that were begun and neither completed nor aborted. They cost money and no list of objects shows them.
//!
//! `object_store` does not list them, so the request is made here, signed by its authorizer. Only S3 is asked: Azure forgets
//! uncommitted blocks by itself after a week, Google's buckets have a lifecycle rule for it.

use std::time::{Duration, SystemTime};

use object_store::aws::{AmazonS3, AwsAuthorizer};
use object_store::client::{HttpClient, HttpConnector, HttpRequestBody, ReqwestConnector};
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{ClientOptions, Error, Result};
use serde::Deserialize;

/// An upload in progress, or left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// As of an object: below the storage's root.
    pub path: String,
    pub id: String,
    pub started: SystemTime,
}

/// Asks an S3 bucket for its uploads.
pub(super) struct Uploads {
    store: AmazonS3,
    client: HttpClient,
    region: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Page {
    #[serde(default)]
    is_truncated: bool,
    #[serde(default)]
    next_key_marker: Option<String>,
    #[serde(default)]
    next_upload_id_marker: Option<String>,
    #[serde(default)]
    upload: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    key: String,
    upload_id: String,
    initiated: String,
}

/// Where a list goes on.
#[derive(Debug, Clone, Default)]
pub(super) struct Marker {
    key: String,
    upload_id: String,
}

impl Uploads {
    pub(super) fn new(store: AmazonS3, options: &ClientOptions, region: String) -> Result<Self> {
        Ok(Self {
            store,
            client: ReqwestConnector::default().connect(options)?,
            region,
        })
    }

    /// A page of the uploads below a prefix, with whole keys as paths, and where the next one begins.
    pub(super) async fn page(
        &self,
        prefix: &str,
        from: &Marker,
    ) -> Result<(Vec<Upload>, Option<Marker>)> {
        let base = self
            .store
            .signed_url(http::Method::GET, &Path::default(), Duration::from_secs(60))
            .await?;
        let mut address = base
            .as_str()
            .split('?')
            .next()
            .unwrap_or_default()
            .to_owned();
        address.push_str("?uploads=");
        for (name, value) in [
            ("prefix", prefix),
            ("key-marker", from.key.as_str()),
            ("upload-id-marker", from.upload_id.as_str()),
        ] {
            if !value.is_empty() {
                address.push_str(&format!("&{name}={}", encode(value)));
            }
        }
        let mut request = http::Request::builder()
            .method(http::Method::GET)
            .uri(address)
            .body(HttpRequestBody::empty())
            .map_err(failed)?;
        let credential = self.store.credentials().get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", &self.region).authorize(&mut request, None);
        let (head, body) = self
            .client
            .execute(request)
            .await
            .map_err(failed)?
            .into_parts();
        let body = body.bytes().await.map_err(failed)?;
        if !head.status.is_success() {
            // In the words of `object_store`, which [`super::reason`] reads.
            let body = String::from_utf8_lossy(&body);
            return Err(Error::Generic {
                store: "S3",
                source: format!("status code: {}: {body}", head.status).into(),
            });
        }
        let page: Page = quick_xml::de::from_reader(&body[..]).map_err(failed)?;
        let uploads = page.upload.into_iter().map(|entry| Upload {
            path: entry.key,
            id: entry.upload_id,
            // One that cannot be read counts as new: nobody aborts it for its age.
            started: chrono::DateTime::parse_from_rfc3339(&entry.initiated)
                .map_or_else(|_| SystemTime::now(), SystemTime::from),
        });
        let next = page.is_truncated.then(|| Marker {
            key: page.next_key_marker.unwrap_or_default(),
            upload_id: page.next_upload_id_marker.unwrap_or_default(),
        });
        Ok((uploads.collect(), next.filter(|next| !next.key.is_empty())))
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Generic {
        store: "S3",
        source: Box::new(error),
    }
}

/// As the signature has it: everything but unreserved characters.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_read() {
        let text = "<?xml version=\"1.0\"?><ListMultipartUploadsResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
            <Bucket>b</Bucket><IsTruncated>true</IsTruncated><NextKeyMarker>k2</NextKeyMarker>\
            <NextUploadIdMarker>u2</NextUploadIdMarker>\
            <Upload><Key>k1</Key><UploadId>u1</UploadId><Owner><ID>o</ID></Owner><Initiated>2026-01-02T03:04:05.000Z</Initiated></Upload>\
            <Upload><Key>k2</Key><UploadId>u2</UploadId><Initiated>2026-01-02T03:04:05.000Z</Initiated></Upload>\
            </ListMultipartUploadsResult>";
        let page: Page = quick_xml::de::from_str(text).unwrap();
        assert!(page.is_truncated);
        assert_eq!(page.upload.len(), 2);
        assert_eq!(page.upload[1].upload_id, "u2");
        let none: Page = quick_xml::de::from_str(
            "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated><NextKeyMarker/></ListMultipartUploadsResult>",
        )
        .unwrap();
        assert!(none.upload.is_empty() && !none.is_truncated);
    }

    #[test]
    fn names_are_encoded() {
        assert_eq!(encode("a/b c+ü~"), "a%2Fb%20c%2B%C3%BC~");
    }
}
