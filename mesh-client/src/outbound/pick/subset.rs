//! Subsets by endpoint metadata (Envoy `lb_subset_config`): a request that asks for metadata goes to the endpoints that have it.

use super::{Candidate, Group, Picker, Recipe, Turn};
use mesh_xds::resource::{MetadataValue, SubsetConfig, SubsetFallback};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};
use tokio::time::Instant;

/// Metadata keys with their values, in the order of the keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MetadataKey(Box<[(String, Value)]>);

/// A [`MetadataValue`] that can be hashed: numbers by their bits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Value {
    Text(String),
    Number(u64),
    Flag(bool),
}

type Priorities<C> = Vec<Vec<Arc<Group<C>>>>;

/// The endpoints of each subset: made when the endpoints change.
pub(super) struct Subsets<C> {
    config: Arc<SubsetConfig>,
    by_key: HashMap<MetadataKey, Priorities<C>>,
    default: Option<Priorities<C>>,
}

/// A picker for each subset; `None`: none of its endpoints takes connections.
pub(super) struct Pickers<C> {
    config: Arc<SubsetConfig>,
    by_key: HashMap<MetadataKey, Option<Picker<C>>>,
    default: Option<Picker<C>>,
}

/// Which picker a request is for.
pub(super) enum Lookup<'a, C> {
    /// That of its subset, or the one fallen back to.
    Found(&'a Picker<C>),
    /// That of all endpoints.
    Any,
    /// None: the request fails.
    Nowhere,
}

impl MetadataKey {
    /// `None`: nothing is asked for.
    pub(crate) fn new(values: &BTreeMap<String, MetadataValue>) -> Option<Self> {
        let entries = values.iter().map(|(key, value)| (key.clone(), Value::of(value)));
        (!values.is_empty()).then(|| Self(entries.collect()))
    }

    fn has(&self, keys: &[String]) -> bool {
        self.0.iter().map(|(key, _)| key).eq(keys)
    }

    fn part(&self, keys: &[String]) -> Self {
        Self(self.0.iter().filter(|(key, _)| keys.contains(key)).cloned().collect())
    }
}

impl fmt::Display for MetadataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (key, value)) in self.0.iter().enumerate() {
            let separator = if i > 0 { ", " } else { "" };
            match value {
                Value::Text(text) => write!(f, "{separator}{key}={text}")?,
                Value::Number(bits) => write!(f, "{separator}{key}={}", f64::from_bits(*bits))?,
                Value::Flag(flag) => write!(f, "{separator}{key}={flag}")?,
            }
        }
        Ok(())
    }
}

impl Value {
    fn of(value: &MetadataValue) -> Self {
        match value {
            MetadataValue::String(text) => Self::Text(text.clone()),
            MetadataValue::Number(number) => Self::Number(number.to_bits()),
            MetadataValue::Bool(flag) => Self::Flag(*flag),
        }
    }
}

/// The members of a subset by place: priority, group, members.
type Places = BTreeMap<(usize, usize), Vec<usize>>;

impl<C: Candidate> Subsets<C> {
    pub(super) fn new(config: &Arc<SubsetConfig>, priorities: &[Vec<Arc<Group<C>>>]) -> Self {
        let mut places: HashMap<MetadataKey, Places> = HashMap::new();
        let mut default = Places::new();
        for (p, groups) in priorities.iter().enumerate() {
            for (g, group) in groups.iter().enumerate() {
                for (i, member) in group.members().iter().enumerate() {
                    let values = member.lb_metadata();
                    for selector in &config.selectors {
                        let Some(key) = key_of(&values, &selector.keys) else { continue };
                        let subset = places.entry(key).or_default();
                        if !selector.single_host || subset.is_empty() {
                            let members = subset.entry((p, g)).or_default();
                            if members.last() != Some(&i) {
                                members.push(i);
                            }
                        }
                    }
                    if config.default_subset.iter().all(|(key, value)| values.get(key) == Some(value)) {
                        default.entry((p, g)).or_default().push(i);
                    }
                }
            }
        }
        let groups = |places: Places| {
            let mut subset: Priorities<C> = vec![Vec::new(); priorities.len()];
            for ((p, g), members) in places {
                subset[p].push(Arc::new(priorities[p][g].part(&members)));
            }
            subset
        };
        Self {
            config: config.clone(),
            by_key: places.into_iter().map(|(key, places)| (key, groups(places))).collect(),
            default: (!default.is_empty()).then(|| groups(default)),
        }
    }

    pub(super) fn pickers(
        &self,
        recipe: &Recipe,
        turn: &Arc<Turn>,
        previous: Option<&Pickers<C>>,
        now: Instant,
    ) -> Pickers<C> {
        let picker = |(key, priorities): (&MetadataKey, &Priorities<C>)| {
            let before = previous.and_then(|previous| previous.by_key.get(key)).and_then(Option::as_ref);
            (key.clone(), Picker::new(recipe, priorities, turn, before, now))
        };
        let before = previous.and_then(|previous| previous.default.as_ref());
        Pickers {
            config: self.config.clone(),
            by_key: self.by_key.iter().map(picker).collect(),
            default: self.default.as_ref().and_then(|all| Picker::new(recipe, all, turn, before, now)),
        }
    }
}

impl<C> Pickers<C> {
    pub(super) fn lookup(&self, key: Option<&MetadataKey>) -> Lookup<'_, C> {
        let Some(key) = key else { return self.fall_back(&self.config.fallback, None) };
        match self.by_key.get(key) {
            Some(Some(picker)) => Lookup::Found(picker),
            Some(None) if self.config.panic_mode_any => Lookup::Any,
            Some(None) => Lookup::Nowhere,
            None => {
                let selector = self.config.selectors.iter().find(|selector| key.has(&selector.keys));
                let fallback = selector.and_then(|selector| selector.fallback.as_ref());
                self.fall_back(fallback.unwrap_or(&self.config.fallback), Some(key))
            }
        }
    }

    fn fall_back(&self, fallback: &SubsetFallback, key: Option<&MetadataKey>) -> Lookup<'_, C> {
        match (fallback, key) {
            (SubsetFallback::Any, _) => Lookup::Any,
            (SubsetFallback::Default, _) => match &self.default {
                Some(picker) => Lookup::Found(picker),
                None if self.config.panic_mode_any => Lookup::Any,
                None => Lookup::Nowhere,
            },
            // Fewer keys each time: it ends.
            (SubsetFallback::Keys(keys), Some(key)) => self.lookup(Some(&key.part(keys))),
            (SubsetFallback::Keys(_) | SubsetFallback::None, _) => Lookup::Nowhere,
        }
    }
}

fn key_of(values: &BTreeMap<String, MetadataValue>, keys: &[String]) -> Option<MetadataKey> {
    let entries = keys.iter().map(|key| Some((key.clone(), Value::of(values.get(key)?))));
    entries.collect::<Option<Box<[_]>>>().map(MetadataKey)
}
