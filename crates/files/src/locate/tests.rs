use super::*;

#[test]
fn patterns_match_inside_the_root_only() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    fs::create_dir_all(root.join("2024/05")).unwrap();
    for name in [
        "b.csv",
        "a.csv",
        "a.json",
        "2024/05/x.csv",
        ".hidden.csv",
        "[1].csv",
    ] {
        fs::write(root.join(name), name).unwrap();
    }
    fs::write(folder.path().join("secret.csv"), "secret").unwrap();
    std::os::unix::fs::symlink(folder.path().join("secret.csv"), root.join("link.csv")).unwrap();
    std::os::unix::fs::symlink(root.join("a.csv"), root.join("own.csv")).unwrap();

    let names = |pattern: &str, confined| {
        find(&root, pattern, confined)
            .map(|found| found.into_iter().map(|f| f.name).collect::<Vec<String>>())
            .map_err(|e| e.sqlstate())
    };
    let owned = |names: &[&str]| Ok(names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>());
    assert_eq!(names("a.csv", true), owned(&["a.csv"]));
    assert_eq!(names("*.json", true), owned(&["a.json"]));
    assert_eq!(
        names("*.csv", true),
        owned(&["[1].csv", "a.csv", "b.csv", "own.csv"])
    );
    assert_eq!(names("[1].csv", true), owned(&["[1].csv"]));
    assert_eq!(names("**/x.csv", true), owned(&["2024/05/x.csv"]));
    assert_eq!(names("2024/*/?.csv", true), owned(&["2024/05/x.csv"]));
    assert_eq!(names("link.csv", true), Err("58P01"));
    assert_eq!(names("link.csv", false), owned(&["link.csv"]));
    assert_eq!(names("none.csv", true), Err("58P01"));
    assert_eq!(names("2024", true), Err("58P01"));
    for bad in [
        "",
        "/etc/passwd",
        "../secret.csv",
        "a/../../secret.csv",
        "a\0b",
        "./a.csv",
    ] {
        assert_eq!(names(bad, true), Err("22023"), "{bad}");
    }
    let found = find(&root, "b.csv", true).unwrap();
    assert_eq!(found[0].bytes, 5);
    assert!(found[0].modified_ns > 0);
    assert!(find(&folder.path().join("away"), "*.csv", true).is_err());
}

#[test]
fn a_prefix_is_a_file_a_pattern_or_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    fs::create_dir_all(root.join("data/_year=1/sub")).unwrap();
    fs::create_dir_all(root.join("data/_temporary")).unwrap();
    fs::create_dir_all(root.join("empty")).unwrap();
    fs::create_dir_all(root.join("other")).unwrap();
    for name in [
        "data/a.csv",
        "data/b.json",
        "data/plain",
        "data/_SUCCESS",
        "data/.a.csv.crc",
        "data/_temporary/x.csv",
        "data/_year=1/sub/c.csv.gz",
        "other/o.csv",
    ] {
        fs::write(root.join(name), name).unwrap();
    }
    fs::write(folder.path().join("secret.csv"), "secret").unwrap();
    let link = |from: &Path, to: &str| std::os::unix::fs::symlink(from, root.join(to)).unwrap();
    link(&folder.path().join("secret.csv"), "data/out.csv");
    link(&root.join("other/o.csv"), "data/beside.csv");
    link(&root.join("data/a.csv"), "data/own.csv");
    link(&root.join("data"), "data/circle");
    link(folder.path(), "away");

    let names = |prefix: &str, confined, format: Option<Format>| {
        below(&root, prefix, confined, format, &|| true)
            .map(|found| found.into_iter().map(|f| f.name).collect::<Vec<String>>())
            .map_err(|e| e.sqlstate())
    };
    let owned = |names: &[&str]| Ok(names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>());
    for confined in [true, false] {
        assert_eq!(
            names("data", confined, None),
            owned(&[
                "data/_year=1/sub/c.csv.gz",
                "data/a.csv",
                "data/b.json",
                "data/own.csv"
            ])
        );
        assert_eq!(
            names("data/", confined, Some(Format::Ndjson)),
            owned(&["data/b.json", "data/plain"])
        );
        assert_eq!(names("data/a.csv", confined, None), owned(&["data/a.csv"]));
        assert_eq!(
            names("data/*.csv", confined, None),
            owned(&["data/a.csv", "data/own.csv"])
        );
        assert_eq!(names("data/*.avro", confined, None), owned(&[]));
        assert_eq!(names("empty", confined, None), owned(&[]));
        assert_eq!(names("none", confined, None), Err("58P01"));
        assert_eq!(names("none/*.csv", confined, None), Err("58P01"));
        assert_eq!(names("../root/data", confined, None), Err("22023"));
    }
    assert_eq!(names("away", true, None), Err("58P01"));
    assert_eq!(names("away/*.csv", true, None), Err("58P01"));
    let stopped = below(&root, "data", true, None, &|| false);
    assert_eq!(stopped.map(drop).map_err(|e| e.sqlstate()), Err("57014"));
}

/// Who may name any file of the server names it from its root.
#[test]
fn a_whole_path_is_shown_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let folder = fs::canonicalize(folder.path()).unwrap();
    fs::write(folder.join("a.csv"), "a\n").unwrap();
    let named = |name: &str| folder.join(name).display().to_string();
    let server = Path::new("/");
    let found = find(server, &named("*.csv")[1..], false).unwrap();
    assert_eq!(found[0].name, named("a.csv"));
    let found = below(server, &named("")[1..], false, None, &|| true).unwrap();
    assert_eq!(found[0].name, named("a.csv"));
    for missing in [
        find(server, &named("b.csv")[1..], false),
        below(server, &named("b.csv")[1..], false, None, &|| true),
    ] {
        assert_eq!(missing.unwrap_err(), FilesError::NoFile(named("b.csv")));
    }
    let invalid = find(server, &named("a[")[1..], false).unwrap_err();
    let many = data_below(server, &named("")[1..], false, (None, 0), &|| true).unwrap_err();
    for (error, name) in [(invalid, "a["), (many, "")] {
        match error {
            FilesError::Path { path, .. } => assert_eq!(path, named(name)),
            other => panic!("{other}"),
        }
    }
    assert_eq!(find(&folder, "*.csv", true).unwrap()[0].name, "a.csv");
}
