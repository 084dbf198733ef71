use super::*;
use crate::roads;
use crate::testing::Random;

fn limits() -> Limits {
    Limits {
        max_event_bytes: 1000,
        ..Limits::default()
    }
}

fn state(properties: &str) -> Result<String, &'static str> {
    check_event(properties, &limits())
        .map(Cow::into_owned)
        .map_err(|e| e.sqlstate())
}

#[test]
fn events_are_checked() {
    let long_id = |n| format!(r#"{{"_id":"{}"}}"#, "x".repeat(n));
    let deep = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n - 1), "]".repeat(n - 1));
    for (text, expected) in [
        ("{}", Ok("{}")),
        (" {\"a\":\r\n1} \n", Ok("{\"a\":  1}")),
        (
            r#"{"_time":"soon","_user":1,"_new":2}"#,
            Ok(r#"{"_time":"soon","_user":1,"_new":2}"#),
        ),
        ("", Err("22P02")),
        ("{\"a\":}", Err("22P02")),
        ("{\"a\":1} {}", Err("22P02")),
        ("{\"a\":\"\\ud800\"}", Err("22P02")),
        ("[]", Err("22023")),
        ("null", Err("22023")),
        ("\"{}\"", Err("22023")),
        (r#"{"a":["\u0000"]}"#, Err("22P05")),
        (r#"{"_received_at":null}"#, Err("42939")),
        (r#"{"_extra":{}}"#, Err("42939")),
        (r#"{"_Extra":{}}"#, Err("42939")),
        (r#"{"_project":"p"}"#, Err("42939")),
        (r#"{"\u005fcollection":"c"}"#, Err("42939")),
        (r#"{"$serverTime":1}"#, Err("42939")),
        (r#"{"_id":1e400}"#, Ok(r#"{"_id":1e400}"#)),
        (r#"{"a":1e200000}"#, Err("22003")),
        (&deep(64), Ok(&deep(64))),
        (&deep(65), Err("54000")),
        (&long_id(256), Ok(&long_id(256))),
        (&long_id(257), Err("54000")),
        (&format!("{{\"a\":\"{}\"}}", "x".repeat(1000)), Err("54000")),
    ] {
        assert_eq!(state(text).as_deref(), expected.as_ref().copied(), "{text}");
    }
    // The last `_id` counts, by its text.
    let two = format!(r#"{{"_id":"{}","_ID":"short"}}"#, "x".repeat(300));
    assert!(state(&two).is_ok());
    let escaped = format!(r#"{{"_id":"{}"}}"#, "\\u0041".repeat(100));
    assert!(state(&escaped).is_ok());
}

#[test]
fn a_bad_item_is_rejected_alone() {
    let deep = |n: usize| {
        let arrays = ["[".repeat(n - 1), "]".repeat(n - 1)].concat();
        format!("{{\"collection\":\"c\",\"properties\":{{\"a\":{arrays}}}}}")
    };
    let items = [
        (
            "{\"properties\":{\"a\":\n1},\"collection\":\"PageView\"}",
            Ok("pageview {\"a\": 1}"),
        ),
        ("1", Err("22023")),
        ("null", Err("22023")),
        ("{}", Err("22023")),
        (r#"{"collection":"c"}"#, Err("22023")),
        (r#"{"collection":1,"properties":{}}"#, Err("22023")),
        (r#"{"collection":"c","properties":[]}"#, Err("22023")),
        (r#"{"collection":"c","properties":null}"#, Err("22023")),
        (
            r#"{"collection":"c","properties":{},"api":1}"#,
            Err("22023"),
        ),
        (r#"{"collection":"","properties":{}}"#, Err("42602")),
        (r#"{"collection":"users","properties":{}}"#, Err("42939")),
        (
            r#"{"collection":"c","properties":{"_extra":1}}"#,
            Err("42939"),
        ),
        (
            r#"{"collection":"c","properties":{"a":"\u0000"}}"#,
            Err("22P05"),
        ),
        (r#"{"collection":"c\u0000","properties":{}}"#, Err("22P05")),
        (&deep(64), Ok("c ")),
        (&deep(65), Err("54000")),
        (&deep(100_000), Err("54000")),
    ];
    let text = format!("[{}]", items.map(|(text, _)| text).join(" ,\n"));
    let Batch {
        collections,
        items: results,
    } = split_batch(&text, &limits()).unwrap_or_default();
    assert_eq!(results.len(), items.len());
    for ((text, expected), result) in items.into_iter().zip(results) {
        match (expected, result) {
            (Ok(start), Ok(item)) => {
                let name = &collections[item.collection];
                let shown = format!("{name} {}", item.properties);
                assert!(shown.starts_with(start), "{shown}");
                assert!(!shown.contains('\n'));
            }
            (expected, result) => assert_eq!(
                result.map_err(|e| e.sqlstate()).err(),
                expected.err(),
                "{:.80}",
                text
            ),
        }
    }
}

#[test]
fn new_names_are_those_that_nobody_knows() {
    let event =
        r#"{"_user":"u","Known":1,"newField":2,"new_field":3,"none":null,"xmin":1,"list":[]}"#;
    let new = new_names(event, |name| name == "known").unwrap_or_default();
    assert_eq!(
        new.unknown,
        ["new_field", "new_field", "none", "xmin", "list"]
    );
    assert_eq!(new.fields, ["new_field"]);
    assert_eq!(new_names("{}", |_| false), Ok(NewNames::default()));
}

#[test]
fn a_batch_is_an_array() {
    let state = |text| split_batch(text, &limits()).map_err(|e| e.sqlstate());
    assert_eq!(state(" [ ] "), Ok(Batch::default()));
    for text in ["{}", "1", "null"] {
        assert_eq!(state(text), Err("22023"), "{text}");
    }
    for text in ["", "[", "[1,]", "[{\"a\"}]", "[] x"] {
        assert_eq!(state(text), Err("22P02"), "{text}");
    }
}

/// An event of the generator, an edge of the checks, or either of them mangled.
fn any_event(random: &mut Random) -> String {
    let edges = [
        "{\"a\":1e131071}",
        "{\"a\":1E+131072}",
        "{\"a\":1e-16383}",
        "{\"a\":1.5e-16383}",
        "{\"a\":\"\\u0000\"}",
        "{\"a\\u0000\":1}",
        "{\"a\":\"\\ud83d\\ude00 \\/\\b\\f\\n\\r\\t\\\\\"}",
        "{\"a\":\"\\ud83d\"}",
        "{\"a\":\"\\ud83d\\u0041\"}",
        "{\"a\":\"\\udc00\"}",
        "{\"a\":\"\\u12\"}",
        "{\"a\":\"\\x\"}",
        "{\"a\":\"twelve bytes\u{1}\"}",
        "{\"a\":\"\u{7f}\u{80}\u{7ff}\u{10ffff}\"}",
        "{\"a\":[1,]}",
        "{\"a\":[{}],\"b\":{\"c\":[[],{}]}}",
        "{\"a\":[}}",
        "{\"a\":tru}",
        "{\"a\":nulll}",
        "{\"a\":-}",
        "{\"a\":.5}",
        "{\"a\":5.}",
        "{\"a\":1e}",
        "{\"a\" 1}",
        "{,}",
        "{\"a\":1 \"b\":2}",
        "{\"_received_at\":1}",
        "{\"\\u005fextra\":1}",
        "{\".Project\":1}",
        "{\"$serverTime\":1}",
        "[]",
        "\"a\"",
        "",
    ];
    let text = match random.next() % 8 {
        0 => random.pick(&edges).to_owned(),
        1 => {
            let levels = 60 + (random.next() % 8) as usize;
            let (open, close) = match random.next() % 2 {
                0 => ("[", "]"),
                _ => ("{\"k\":", "}"),
            };
            format!("{{\"a\":{}1{}}}", open.repeat(levels), close.repeat(levels))
        }
        2 => format!(
            "{{\"_id\":\"{}\"}}",
            "i".repeat(250 + (random.next() % 12) as usize)
        ),
        3 => format!(
            "{{\"_Id\":[{}]}}",
            "1e40,".repeat((random.next() % 12) as usize) + "1"
        ),
        _ => random.object(0, 8),
    };
    match random.next() % 3 {
        0 => random.mangled(&text),
        1 => format!(
            "{}{text}{}",
            random.pick(&["", " ", "\n\t"]),
            random.pick(&["", "\r\n"])
        ),
        _ => text,
    }
}

#[test]
fn the_usual_road_accepts_exactly_what_the_careful_way_does() {
    let mut accepted = 0;
    for seed in 0..30_000 {
        let text = any_event(&mut Random(seed));
        accepted += usize::from(roads::event(&text));
    }
    assert!((10_000..25_000).contains(&accepted), "{accepted}");
}

#[test]
fn batches_are_split_alike_on_both_roads() {
    let mut usual = 0;
    for seed in 0..6_000 {
        let mut random = Random(seed);
        let items: Vec<String> = (0..random.next() % 5)
            .map(|_| {
                let properties = any_event(&mut random);
                let name =
                    random.pick(&["\"c\"", "\"C\"", "\"d\\u0064\"", "\"users\"", "1", "null"]);
                let name = format!("\"collection\" : {name}");
                let properties = format!("\"properties\":{properties}");
                match random.next() % 12 {
                    0 => "7".to_owned(),
                    1 => format!("{{{name}}}"),
                    2 => format!("{{{name},{properties},{name}}}"),
                    3 => format!("{{{name},\"x\":1,{properties}}}"),
                    4..=7 => format!("{{{properties},{name}}}"),
                    _ => format!("{{{name}, {properties}}}"),
                }
            })
            .collect();
        let mut text = format!(" [{}]\n", items.join(random.pick(&[",", ", ", "\n,"])));
        if random.next().is_multiple_of(4) {
            text = random.mangled(&text);
        }
        roads::batch(&text, &limits());
        usual += usize::from(scan_batch(&text, &limits()).is_ok_and(|b| !b.items.is_empty()));
    }
    assert!(usual > 1_000, "{usual}");
}
