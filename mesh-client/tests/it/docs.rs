//! The documents stay true.

use std::path::Path;

#[test]
fn docs_features_name_real_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let features = std::fs::read_to_string(root.join("docs/features.md")).unwrap();
    let names: Vec<_> = features.split('`').filter_map(|code| code.split_once(".rs::")).collect();
    assert!(names.len() > 40, "only {} tests are named", names.len());
    for (file, test) in names {
        let path = root.join(format!("{file}.rs"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(text.contains(&format!("fn {test}(")), "{file}.rs has no test {test}");
    }
}
