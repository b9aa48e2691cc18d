package qupath.lib.objects.hierarchy

import qupath.lib.objects.PathObject

class PathObjectHierarchy {

    private List<PathObject> objects = []

    Collection<PathObject> getAllObjects(boolean includeRoot) {
        assert !includeRoot
        new ArrayList<PathObject>(objects)
    }

    boolean addObjects(Collection<? extends PathObject> pathObjects) { objects.addAll(pathObjects) }

    void removeObjects(Collection<? extends PathObject> pathObjects, boolean keepChildren) {
        assert keepChildren
        objects.removeAll(pathObjects)
    }

}
