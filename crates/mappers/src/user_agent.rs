//! Browser, operating system and device of a user agent.

use std::borrow::Cow;

use rakam_event::error::EventError;
use rakam_event::json;
use woothee::parser::Parser;
use woothee::woothee::VALUE_UNKNOWN;

use crate::{fields, fill};

/// Longest user agent that is looked at: what browsers send is a tenth of that.
const BYTES_MAX: usize = 4096;

/// Adds `browser`, `browser_version`, `os` and `device` by `_user_agent`, as far as they are known.
///
/// `device` is `desktop`, `smartphone`, `phone`, `iPhone`, `iPad`, `iPod`, `appliance`, `crawler` or `other`.
pub fn map(event: &str) -> Result<Cow<'_, str>, EventError> {
    let [agent, browser, version, os, device] = fields(
        event,
        ["_user_agent", "browser", "browser_version", "os", "device"],
    )?;
    let Some(agent) = agent.and_then(json::string) else {
        return Ok(Cow::Borrowed(event));
    };
    if agent.is_empty() || agent.len() > BYTES_MAX {
        return Ok(Cow::Borrowed(event));
    }
    let Some(parsed) = Parser::new().parse(&agent) else {
        return Ok(Cow::Borrowed(event));
    };
    Ok(fill(
        event,
        &[
            ("browser", browser, known(parsed.name)),
            ("browser_version", version, known(parsed.version)),
            ("os", os, known(system(parsed.os))),
            ("device", device, kind(parsed.os, parsed.category)),
        ],
    ))
}

fn known(value: &str) -> Option<&str> {
    (!value.is_empty() && value != VALUE_UNKNOWN).then_some(value)
}

/// The parser names Apple's systems by the device.
fn system(os: &str) -> &str {
    match os {
        "iPhone" | "iPad" | "iPod" | "iOS" => "iOS",
        "Mac OSX" => "macOS",
        other => other,
    }
}

fn kind<'a>(os: &'a str, category: &'a str) -> Option<&'a str> {
    match (os, category) {
        ("iPhone" | "iPad" | "iPod", _) => Some(os),
        (_, "pc") => Some("desktop"),
        (_, "smartphone") => Some("smartphone"),
        (_, "mobilephone") => Some("phone"),
        (_, "appliance") => Some("appliance"),
        (_, "crawler") => Some("crawler"),
        (_, "misc") => Some("other"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHROME: &str = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) \
                          Chrome/120.0.6099.109 Safari/537.36";
    const SAFARI: &str = "Mozilla/5.0 (iPhone; CPU iPhone OS 17_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like \
                          Gecko) Version/17.1 Mobile/15E148 Safari/604.1";
    const FIREFOX: &str =
        "Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:121.0) Gecko/20100101 Firefox/121.0";
    const ANDROID: &str = "Mozilla/5.0 (Linux; Android 13; Pixel 7) AppleWebKit/537.36 (KHTML, like Gecko) \
                           Chrome/116.0.0.0 Mobile Safari/537.36";
    const BOT: &str = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)";

    fn mapped(agent: &str) -> [Option<String>; 4] {
        let event = format!("{{\"_user_agent\":\"{agent}\"}}");
        let event = map(&event).expect("an object");
        fields(&event, ["browser", "browser_version", "os", "device"])
            .expect("an object")
            .map(|raw| raw.and_then(json::string).map(Cow::into_owned))
    }

    #[test]
    fn common_browsers_are_known() {
        for (agent, expected) in [
            (
                CHROME,
                ["Chrome", "120.0.6099.109", "Windows 10", "desktop"],
            ),
            (SAFARI, ["Safari", "17.1", "iOS", "iPhone"]),
            (FIREFOX, ["Firefox", "121.0", "macOS", "desktop"]),
            (ANDROID, ["Chrome", "116.0.0.0", "Android", "smartphone"]),
        ] {
            let expected = expected.map(|text| Some(text.to_owned()));
            assert_eq!(mapped(agent), expected, "{agent}");
        }
        let [browser, _, os, device] = mapped(BOT);
        assert_eq!(browser.as_deref(), Some("Googlebot"));
        assert_eq!((os, device.as_deref()), (None, Some("crawler")));
    }

    #[test]
    fn what_is_there_is_kept_and_what_is_unknown_left_out() {
        let event = format!(r#"{{"_user_agent":"{CHROME}","Browser":"mine","os":null}}"#);
        let out = map(&event).expect("an object");
        assert_eq!(out.matches("rowser\":").count(), 1, "{out}");
        assert!(
            out.contains(r#""Browser":"mine""#) && out.contains(r#""os":"Windows 10""#),
            "{out}"
        );
        for event in [
            r#"{}"#,
            r#"{"_user_agent":""}"#,
            r#"{"_user_agent":7}"#,
            r#"{"_user_agent":null}"#,
            r#"{"_user_agent":"-"}"#,
        ] {
            assert_eq!(map(event).expect("an object"), event);
        }
        let long = format!(r#"{{"_user_agent":"{}"}}"#, "Chrome/1 ".repeat(10_000));
        assert_eq!(map(&long).expect("an object"), long);
        assert!(map("[]").is_err());
    }
}
