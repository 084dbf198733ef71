use super::*;

#[test]
fn scan_finds_what_the_parser_lets_through() {
    let state = |text: &str| check(text, MAX_DEPTH).map_err(|e| e.sqlstate());
    let nested = |n| "[".repeat(n) + &"]".repeat(n);
    assert_eq!(state(&nested(64)), Ok(()));
    assert_eq!(state(&nested(65)), Err("54000"));
    assert_eq!(state(&"[".repeat(1_000_000)), Err("54000"));
    assert_eq!(state(&format!("\"{}\"", "[".repeat(100))), Ok(()));
    for (text, expected) in [
        (r#"{"a":"\u0000"}"#, Err("22P05")),
        (r#"{"\u0000":1}"#, Err("22P05")),
        (r#"{"a":"\\u0000"}"#, Ok(())),
        (r#"{"a":"\\\u0000"}"#, Err("22P05")),
        (r#"{"a":"\"\u0000"}"#, Err("22P05")),
        (r#"{"a":"\u0001"}"#, Ok(())),
        (r#"{"a":"\ud83d\ude00"}"#, Ok(())),
        (r#"{"a":"\ud83d"}"#, Err("22P02")),
        (r#"{"a":"\ude00"}"#, Err("22P02")),
        (r#"{"a":"\ud83dx"}"#, Err("22P02")),
        (r#"{"a":1e131071}"#, Ok(())),
        (r#"{"a":1e131072}"#, Err("22003")),
        (r#"{"a":"1e131072"}"#, Ok(())),
        (r#"{"a":1E-99999999999999999999}"#, Err("22003")),
        ("\"\\", Ok(())),
        ("\"\\u", Ok(())),
        ("\"\\u00", Ok(())),
        ("é1e9é", Ok(())),
    ] {
        assert_eq!(state(text), expected, "{text}");
    }
}

#[test]
fn entries_keep_order_duplicates_and_number_texts() {
    let mut seen = Vec::new();
    let text = " { \"a\" : 1.0 , \"b\\u0041\":[1, 2],\"a\":null}\n";
    let result = object_entries(text, |key, raw| seen.push((key.to_owned(), raw)));
    assert_eq!(result, Ok(()));
    let expected = [("a", "1.0"), ("bA", "[1, 2]"), ("a", "null")];
    assert!(seen.iter().map(|(k, v)| (k.as_str(), *v)).eq(expected));
}

#[test]
fn shape_and_syntax_are_told_apart() {
    let state = |text| object_entries(text, |_, _| {}).map_err(|e| e.sqlstate());
    for text in ["[]", "1", "null", "\"x\"", " true "] {
        assert_eq!(state(text), Err("22023"), "{text}");
    }
    for text in [
        "",
        " ",
        "{",
        "{\"a\"}",
        "{\"a\":1,}",
        "{} x",
        "nul",
        "{'a':1}",
        "{\"a\":01}",
        "{\"a\":NaN}",
        "{\"a\":\"\n\"}",
    ] {
        assert_eq!(state(text), Err("22P02"), "{text}");
    }
}

#[test]
fn compact_form() {
    let mut cutter = Cutter::new(4);
    let mut out = String::new();
    write_compact(
        "{ \"a long key\" : [ 1.0 , \"éééé\" , \"a b\" ] }",
        &mut cutter,
        &mut out,
    );
    assert_eq!(out, "{\"a long key\":[1.0,\"éé\",\"a b\"]}");
    assert_eq!(cutter.cut_from, Some(8));
    let mut cutter = Cutter::new(3);
    assert_eq!(compact("[\"ab\\\"cd\"]", &mut cutter), "[\"ab\\\"\"]");
    assert_eq!(compact("[1,2]", &mut Cutter::off()), "[1,2]");
}

#[test]
fn canonical_form_is_that_of_jsonb_without_blanks() {
    let mut out = String::new();
    let raw = r#"{"bb":1.0, "a": {"x":[1e2,"\u0041\n"]}, "bb": 2.50, "B":null}"#;
    assert_eq!(write_canonical(raw, &mut Cutter::off(), &mut out), Ok(()));
    assert_eq!(out, r#"{"B":null,"a":{"x":[100,"A\n"]},"bb":2.5}"#);
}

#[test]
fn strings_are_written_as_postgres_does() {
    let mut out = String::new();
    write_string("a\"\\\n\r\t\u{8}\u{c}\u{1}\u{1f}\u{7f}é", &mut out);
    assert_eq!(out, "\"a\\\"\\\\\\n\\r\\t\\b\\f\\u0001\\u001f\u{7f}é\"");
    assert_eq!(
        string(&out).as_deref(),
        Some("a\"\\\n\r\t\u{8}\u{c}\u{1}\u{1f}\u{7f}é")
    );
}
