//! Where a visit came from.

use std::borrow::Cow;

use rakam_event::error::EventError;
use rakam_event::json;
use url::Url;

use crate::{fields, fill};

/// Longest referrer that is looked at; browsers cut theirs at half of that.
const BYTES_MAX: usize = 8192;

/// Adds `referrer_host`, `referrer_medium` and `referrer_term` by `_referrer`, if it is a URL with a host.
///
/// `referrer_medium` is `search`, `social`, `email` or `unknown`; `referrer_term` what was searched for, where the
/// search engine tells.
pub fn map(event: &str) -> Result<Cow<'_, str>, EventError> {
    let [referrer, host, medium, term] = fields(
        event,
        [
            "_referrer",
            "referrer_host",
            "referrer_medium",
            "referrer_term",
        ],
    )?;
    let url = referrer
        .and_then(json::string)
        .filter(|text| text.len() <= BYTES_MAX)
        .and_then(|text| Url::parse(text.trim()).ok());
    let Some((url, name)) = url.as_ref().and_then(|url| Some((url, url.host_str()?))) else {
        return Ok(Cow::Borrowed(event));
    };
    let (found, parameters) = medium_of(name);
    let searched = url
        .query_pairs()
        .find(|(key, value)| parameters.contains(&key.as_ref()) && !value.trim().is_empty())
        .map(|(_, value)| value.trim().to_owned());
    Ok(fill(
        event,
        &[
            ("referrer_host", host, Some(name)),
            ("referrer_medium", medium, Some(found)),
            ("referrer_term", term, searched.as_deref()),
        ],
    ))
}

/// Web mail, before search: most of it is run by search engines.
const EMAIL: [&str; 15] = [
    "mail.google.com",
    "inbox.google.com",
    "mail.yahoo.com",
    "outlook.live.com",
    "outlook.office.com",
    "outlook.office365.com",
    "mail.live.com",
    "mail.aol.com",
    "mail.yandex.com",
    "mail.yandex.ru",
    "e.mail.ru",
    "mail.qq.com",
    "mail.163.com",
    "mail.proton.me",
    "mail.zoho.com",
];

/// Domains with everything below them.
const SOCIAL: [&str; 32] = [
    "facebook.com",
    "fb.me",
    "messenger.com",
    "instagram.com",
    "threads.net",
    "twitter.com",
    "t.co",
    "x.com",
    "linkedin.com",
    "lnkd.in",
    "pinterest.com",
    "pin.it",
    "reddit.com",
    "youtube.com",
    "youtu.be",
    "tiktok.com",
    "snapchat.com",
    "tumblr.com",
    "vk.com",
    "ok.ru",
    "weibo.com",
    "quora.com",
    "xing.com",
    "news.ycombinator.com",
    "mastodon.social",
    "bsky.app",
    "t.me",
    "web.telegram.org",
    "whatsapp.com",
    "discord.com",
    "twitch.tv",
    "flickr.com",
];

/// Search engines: a domain with everything below it, and where the words searched for are.
const SEARCH: [(&str, &[&str]); 24] = [
    ("bing.com", &["q"]),
    ("duckduckgo.com", &["q"]),
    ("search.yahoo.com", &["p", "q"]),
    ("search.yahoo.co.jp", &["p"]),
    ("yandex.com", &["text"]),
    ("yandex.ru", &["text"]),
    ("yandex.com.tr", &["text"]),
    ("ya.ru", &["text"]),
    ("baidu.com", &["wd", "word"]),
    ("ecosia.org", &["q"]),
    ("qwant.com", &["q"]),
    ("startpage.com", &["query", "q"]),
    ("search.brave.com", &["q"]),
    ("ask.com", &["q"]),
    ("search.aol.com", &["q"]),
    ("search.naver.com", &["query"]),
    ("search.daum.net", &["q"]),
    ("search.seznam.cz", &["q"]),
    ("sogou.com", &["query", "keyword"]),
    ("so.com", &["q"]),
    ("go.mail.ru", &["q"]),
    ("kagi.com", &["q"]),
    ("mojeek.com", &["q"]),
    ("metager.org", &["eingabe"]),
];

fn medium_of(host: &str) -> (&'static str, &'static [&'static str]) {
    let below = |domain: &str| {
        host.strip_suffix(domain)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    if EMAIL.into_iter().any(below) {
        ("email", &[])
    } else if let Some((_, parameters)) = SEARCH.into_iter().find(|(domain, _)| below(domain)) {
        ("search", parameters)
    } else if is_google(host) {
        ("search", &["q"])
    } else if SOCIAL.into_iter().any(below) {
        ("social", &[])
    } else {
        ("unknown", &[])
    }
}

/// Google's search in any country: google.de, www.google.co.uk, not docs.google.com.
fn is_google(host: &str) -> bool {
    let host = ["www.", "m.", "images.", "news."]
        .into_iter()
        .find_map(|prefix| host.strip_prefix(prefix))
        .unwrap_or(host);
    let Some(country) = host.strip_prefix("google.") else {
        return false;
    };
    let labels: Vec<&str> = country.split('.').collect();
    labels.len() <= 2 && labels.iter().all(|label| (2..=3).contains(&label.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(referrer: &str) -> [Option<String>; 3] {
        let mut event = String::from("{\"_referrer\":");
        json::write_string(referrer, &mut event);
        event.push('}');
        let event = map(&event).expect("an object");
        fields(
            &event,
            ["referrer_host", "referrer_medium", "referrer_term"],
        )
        .expect("an object")
        .map(|raw| raw.and_then(json::string).map(Cow::into_owned))
    }

    #[test]
    fn referrers_have_a_medium_and_a_term() {
        for (referrer, host, medium, term) in [
            (
                "https://www.google.com/search?q=event+analytics&ie=utf8",
                "www.google.com",
                "search",
                Some("event analytics"),
            ),
            (
                "https://www.google.co.uk/",
                "www.google.co.uk",
                "search",
                None,
            ),
            (
                "https://google.com.tr/search?q=%C3%A7ay",
                "google.com.tr",
                "search",
                Some("çay"),
            ),
            (
                "https://docs.google.com/document?q=x",
                "docs.google.com",
                "unknown",
                None,
            ),
            (
                "https://google.evil.example/?q=x",
                "google.evil.example",
                "unknown",
                None,
            ),
            ("https://notbing.com/?q=x", "notbing.com", "unknown", None),
            (
                "http://WWW.Bing.com/search?q=",
                "www.bing.com",
                "search",
                None,
            ),
            (
                "https://search.yahoo.com/search?p=a%20b",
                "search.yahoo.com",
                "search",
                Some("a b"),
            ),
            (
                "https://mail.google.com/mail/u/0/?q=x",
                "mail.google.com",
                "email",
                None,
            ),
            (
                "https://l.facebook.com/l.php?u=x",
                "l.facebook.com",
                "social",
                None,
            ),
            ("https://t.co/abc", "t.co", "social", None),
            (
                "https://blog.example.org:8080/post?q=x",
                "blog.example.org",
                "unknown",
                None,
            ),
            (
                "android-app://com.google.android.gm/",
                "com.google.android.gm",
                "unknown",
                None,
            ),
        ] {
            let expected = [
                Some(host.to_owned()),
                Some(medium.to_owned()),
                term.map(str::to_owned),
            ];
            assert_eq!(mapped(referrer), expected, "{referrer}");
        }
        for referrer in [
            "",
            "not a url",
            "/relative",
            "data:text/plain,x",
            "https://",
        ] {
            assert_eq!(mapped(referrer), [None, None, None], "{referrer}");
        }
    }

    #[test]
    fn what_is_there_is_kept() {
        let event = r#"{"_referrer":"https://bing.com/?q=x","referrerMedium":"paid"}"#;
        assert_eq!(
            map(event).expect("an object"),
            r#"{"_referrer":"https://bing.com/?q=x","referrerMedium":"paid","referrer_host":"bing.com","referrer_term":"x"}"#
        );
        assert!(map("null").is_err());
    }
}
