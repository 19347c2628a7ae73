//! Several sorted lists of names into one.

use crate::Fingerprint;
use crate::pack::Place;

use super::Rank;

/// The names of all lists, each once, in order. The lists come newest first: the newest place in a pack of our own wins; else the oldest
/// on a shared image, then on a private one. Places in packs that are gone are left out.
pub(super) fn merge<'a>(
    lists: Vec<Box<dyn Iterator<Item = (Fingerprint, Place)> + 'a>>,
    rank: impl Fn(Place) -> Rank + 'a,
) -> impl Iterator<Item = (Fingerprint, Place)> + 'a {
    let mut lists: Vec<_> = lists.into_iter().map(Iterator::peekable).collect();
    std::iter::from_fn(move || {
        loop {
            let least = lists.iter_mut().filter_map(|list| list.peek().map(|(name, _)| *name)).min()?;
            let mut best: Option<(Place, Rank)> = None;
            for list in &mut lists {
                while let Some((_, place)) = list.next_if(|(name, _)| *name == least) {
                    let rank = rank(place);
                    let better = match best {
                        _ if rank == Rank::Gone => false,
                        None => true,
                        Some((_, Rank::Own)) => false,
                        Some((_, other)) => rank >= other,
                    };
                    if better {
                        best = Some((place, rank));
                    }
                }
            }
            if let Some((place, _)) = best {
                return Some((least, place));
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::At;

    #[test]
    fn own_packs_come_before_images_and_new_ones_before_old_ones() {
        // Packs 0 to 9 are gone, 10 to 14 are private images, 15 to 19 shared ones, the others our own.
        let rank = |place: Place| match place.pack {
            0..10 => Rank::Gone,
            10..15 => Rank::Private,
            15..20 => Rank::Shared,
            _ => Rank::Own,
        };
        let list = |entries: &[(u8, u32)]| -> Vec<(Fingerprint, Place)> {
            entries
                .iter()
                .map(|(n, pack)| (Fingerprint([*n; 16]), Place { pack: *pack, at: At::page(0) }))
                .collect()
        };
        let newest = list(&[(1, 20), (2, 10), (3, 0), (5, 10), (6, 1), (7, 15), (8, 10)]);
        let oldest = list(&[(1, 21), (2, 22), (3, 23), (4, 11), (5, 11), (6, 2), (7, 10), (8, 16)]);
        let merged: Vec<_> =
            merge(vec![Box::new(newest.into_iter()), Box::new(oldest.into_iter())], rank).collect();
        assert_eq!(merged, list(&[(1, 20), (2, 22), (3, 23), (4, 11), (5, 11), (7, 15), (8, 16)]));
    }
}
